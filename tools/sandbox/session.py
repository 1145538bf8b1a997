"""A confined process that lives as long as the trajectory: the caller's side of a session.

python_session and bash_session are made of it; child.py has what runs inside. Every call is under
the caller's deadline; one that does not end in time, is cancelled, crashes or writes too much takes
the session with it. The next call gets a new one, and says so.
"""

import asyncio
import contextlib
import socket

from tools.calling.base import ToolError
from tools.sandbox import caller, fork_server

LOST = "(a new session: what was defined before is lost)"
ENDED = "(the session ended: what was defined is lost)"


class Session:
    """Runs the calls of one trajectory, one at a time."""

    def __init__(self, server: str, no_output: str, raised: int | None = fork_server.RAISED):
        """server: whose child it is. no_output: what a call without any is told. raised: as of
        caller.observation()."""
        self.server = server
        self.no_output = no_output
        self.raised = raised
        self._ctl = None  # the server tells the session's end here; closing it ends the session
        self._requests = None  # each call's sockets go to the session over it
        self._was_lost = False  # the next call has to say so

    async def call(self, code: str) -> str:
        """Runs code; returns what it prints. ToolError if that is an error."""
        data = caller.encode(code)
        if self._ctl and self._has_ended():
            self._end()
        note = LOST if self._was_lost else ""
        self._was_lost = False
        try:
            result = await self._run(data)
        except ToolError as error:
            raise ToolError(error.kind, _joined(note, error.text)) from None
        lost = ENDED if result.session_ended else ""
        try:
            text = caller.observation(result, self.raised)
        except ToolError as error:
            raise ToolError(error.kind, _joined(note, error.text, lost)) from None
        return _joined(note, text or self.no_output, lost)

    async def _run(self, data):
        """Makes one call. What it does not survive, if only a cancellation, ends the session."""
        goes_on = False
        try:
            async with caller.wall_clock():
                if not self._ctl:
                    await self._start()
                result = await caller.exchange(self._hand_over, data, self._ctl)
            if not result.session_ended:
                result.reply = {"status": _exit_status(result.reply) << 8}
            goes_on = not result.session_ended
            return result
        except TimeoutError:
            text = f"error: stopped after {caller.WALL_SECONDS:g} s; the session is lost"
            raise ToolError("timeout", text) from None
        except (ConnectionError, ValueError, RecursionError):  # its code, or the server was killed
            raise ToolError("exception", "error: the session is lost") from None
        finally:
            if not goes_on:
                self._end()

    async def _start(self):
        ctl, far_ctl = socket.socketpair()
        try:
            requests, far_requests = socket.socketpair()  # a byte for each: macOS has no SEQPACKET
        except OSError:
            ctl.close()
            far_ctl.close()
            raise
        self._ctl = ctl
        self._requests = requests
        ctl.setblocking(False)
        requests.setblocking(False)
        with far_ctl, far_requests:
            await caller.start(self.server, "session", far_ctl, far_requests)

    async def _hand_over(self, ctl, out):
        socket.send_fds(self._requests, [b"c"], [ctl.fileno(), out.fileno()])

    def _has_ended(self):
        with contextlib.suppress(BlockingIOError):
            self._ctl.recv(1, socket.MSG_PEEK)
            return True
        return False

    def _end(self):
        self._was_lost = True
        if self._ctl:
            self._ctl.close()
            self._requests.close()
        self._ctl = None
        self._requests = None

    async def close(self) -> None:
        """Ends the session; returns when its processes and files are gone."""
        try:
            if self._ctl:
                with contextlib.suppress(OSError):
                    self._ctl.shutdown(socket.SHUT_WR)
                    await asyncio.get_running_loop().sock_recv(self._ctl, 4096)
        finally:
            self._end()
            self._was_lost = False


def _exit_status(reply):
    status = reply.get("exit") if isinstance(reply, dict) else None
    if not isinstance(status, int) or not 0 <= status <= 255:
        raise ValueError("not what a session sends")
    return status


def _joined(*lines):
    return "\n".join(line for line in lines if line)
