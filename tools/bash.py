"""The bash tool: one command line, in the same sandbox as the python tool, fresh for each call.

The machine's programs (fork_server.PROGRAMS) and python are there, read-only, and an empty scratch
directory. There is no /proc, no /home and next to no /etc, so `ps` and `<(...)` do not work.
Without bash on the machine it is sh. What is covered, and what not: see sandbox/caller.py.
"""

from run.config import UserError
from tools import ToolError
from tools.sandbox import caller


def require_namespaces() -> None:
    """Refuses a system where a command could start no program, or what it starts would live on."""
    if not caller.layers("shell")["pid_namespace"]:
        raise UserError(
            "the bash tool cannot confine a command here, as there are no PID namespaces: use "
            "Linux with user namespaces; in Docker add --security-opt seccomp=unconfined"
        )


class bash:
    shared = True  # nothing lives from one call to the next: every call has its own process

    def __init__(self):
        require_namespaces()

    async def __call__(self, command: str) -> str:
        """Run a bash command in an empty directory and return what it prints.

        Args:
            command: The command line or script. No network; files do not stay for the next call.
        """
        if "\0" in command:
            raise ToolError("bad_arguments", "error: a command cannot contain a null byte")
        result = await caller.call("shell", command)
        return caller.observation(result, raised=None) or "(no output)"
