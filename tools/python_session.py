"""The python_session tool: python whose variables and files live as long as the trajectory.

One confined process from the first call to close() (sandbox/session.py), with the layers of
sandbox/caller.py around it.

What is covered beyond the python tool: each call has sockets of its own, so a process that a call
leaves cannot speak in a later one. What is not: a thread can, and can keep it waiting until its
deadline; it harms its own trajectory alone. See also what sandbox/caller.py says on sessions.
"""

from tools.python import NO_OUTPUT, prepare
from tools.sandbox.session import Session


class python_session:
    prepare = staticmethod(prepare)

    def __init__(self, unconfined: bool = False):
        """unconfined: as of the python tool; prepare() has looked at it."""
        self.session = Session("heavy", NO_OUTPUT)

    async def __call__(self, code: str) -> str:
        """Run Python code and return what it prints. Variables and files stay for the next calls.

        Args:
            code: Python 3 code with numpy and sympy, no network. Use print to see a value.
        """
        return await self.session.call(code)

    async def close(self) -> None:
        """Ends the session; returns when its processes and files are gone."""
        await self.session.close()
