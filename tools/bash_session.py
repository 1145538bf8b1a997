"""The bash_session tool: a shell whose directory, variables, functions, jobs and files live as long
as the trajectory.

One bash from the first call to close() (sandbox/session.py), in the sandbox of the bash tool. What
a call starts in the background runs on; what that prints is heard as on a terminal, in the next
call at the latest (the last 64 KB of it). A command reads nothing from stdin. What ends the shell
(`exit`, `set -e`, `exec`) ends the session, and so does a call that is not over at its deadline:
all that runs in it is killed then. Each process has the CPU time of a call, the shell itself too.
What is covered, and what not: see sandbox/caller.py, what it says of sessions too.
"""

import os

from run.config import UserError
from tools import ToolError
from tools.bash import require_namespaces
from tools.sandbox.session import Session


class bash_session:
    def __init__(self):
        self.session = Session("shell", "(no output)", raised=None)

    @staticmethod
    def prepare() -> None:
        require_namespaces()
        if not os.path.exists("/bin/bash"):
            raise UserError("bash_session needs /bin/bash, and this machine has none: install it")

    async def __call__(self, command: str) -> str:
        """Run a bash command and return what it prints. The directory, variables, functions,
        background jobs and files stay for the next calls.

        Args:
            command: The command line or script. No network, and nothing on stdin.
        """
        if "\0" in command:
            raise ToolError("bad_arguments", "error: a command cannot contain a null byte")
        return await self.session.call(command)

    async def close(self) -> None:
        """Ends the session; returns when its processes and files are gone."""
        await self.session.close()
