"""Calls tools, each call under a deadline, and makes an observation of whatever comes.

    box = Toolbox(["python", "my_tools.py:weather"], concurrency=16, timeout=10.0)
    session = box.open(example)  # the state of one trajectory; example: its data row
    content, error, seconds = await session.call("python", {"code": "print(6 * 7)"})
    await session.close()

A tool is a typed function with a Google-style docstring in tools/<name>.py, of that very name; or
a class of that name, whose typed, documented `__call__` is the tool. A class holds state: an
instance for each trajectory, made at its first call, or, if it says `shared = True`, one for the
run, made at the start. Its `__init__` takes the options that a user may set, as
tool_options=("search.k=5",), and `example`, the data row, if it asks for it; `close()` is optional.
`async def` tools are awaited, sync ones run in a thread of their own. A tool returns text, a PIL
image, or a list of both; all else becomes text. A `Result` is also worth a reward to its turn, has
metrics, or ends the episode. Marks, on the function or the class:

    pure = True     the same arguments give the same result: it is kept for the run, in memory. The
                    instance of a trajectory also has a `key`: what else its results depend on
    network = True  a NetworkError that it raises is tried again, inside the deadline
    ends = True     a call without an error ends the episode, and its result is the answer
    prepare = f     f(options) is called at the start: UserError where the tool cannot work here; a
                    function has the options of its f, a class those of its __init__
    describe = f    of a class: f(schema, options) gives the schema as those options have it
    sees = True     of a class: its argument `image` is the number, from 1, of one of the images in
                    example["images"], the trajectory's, in a list that grows
    takes_images = True  of a class: its first argument, `pictures`, is that list, and not the
                    model's to give: for one that is shared by all trajectories

A class without `__call__` is an environment: its public methods are tools that share its state, and
hooks say what stands in the prompt, what the user answers, and what the final state is worth:
calling/environment.py. What fails of it costs its trajectory, counted under `environment`.

Options of every tool: timeout, concurrency, cache (true, false), retries (of network tools).

A Toolbox belongs to one event loop for its life: to that of run_blocking, in a run.

Whatever the model or the tool does wrong becomes a short observation that says what would be
right, is counted in `Toolbox.errors` under its own name, and never raises:

    unknown_tool   no tool of that name           bad_arguments  do not fit the tool's schema
    exception      the tool raised                timeout        the tool did not end in time
    oversized      above MAX_RESULT_CHARS         close          a stateful tool's close() failed
    network        no answer, after all retries   server         an MCP server ended
    bad_json       the call could not be read: found by chat.py, counted here by the rollout

A tool that wants another kind, or its own words for the model, raises `ToolError(kind, text)`. A
`UserError` is not the model's mistake (a row names a database that is not there): it ends the run.
"""

from run.config import UserError
from tools.calling.base import DEADLINE, NetworkError, Result, Tool, ToolError
from tools.calling.toolbox import Session, Toolbox

__all__ = [
    "DEADLINE", "NetworkError", "Result", "Session", "Tool", "ToolError", "Toolbox", "UserError",
]  # fmt: skip
