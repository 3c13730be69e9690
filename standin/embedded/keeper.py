"""Keeper of one server: starts it, and ends it when the pipe from its owner closes.

Run as a script by `standin.embedded.process`, with nothing but the standard library, so that it
starts fast. A pipe closes however its owner dies, kill -9 included, so no server is ever left
behind. Should the keeper itself be killed, Linux ends the server (parent-death signal).

    keeper.py UID GID STOP_SIGNAL GRACE_SECONDS COMMAND...

Standard input: nothing, or the number of a signal for the server in each line; end of file stops it.
Standard output: the server's process id, then `exit CODE` when it has ended.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading

_PR_SET_PDEATHSIG = 1


def _follow_parent(stop_signal: int, parent: int) -> None:
    # Runs between fork and exec, after the change of user, which would clear the setting.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, stop_signal)
        if os.getppid() != parent:
            os._exit(1)


def _become(uid: int, gid: int) -> None:
    if uid >= 0:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)


def _watch(server: "subprocess.Popen[bytes]", ended: int, stop_signal: int, grace: float) -> None:
    buffer = b""
    while server.poll() is None:
        readable, _, _ = select.select([0, ended], [], [])
        if ended in readable:
            return
        data = os.read(0, 4096)
        if not data:
            _stop(server, stop_signal, grace)
            return
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ProcessLookupError):
                server.send_signal(int(line))


def _stop(server: "subprocess.Popen[bytes]", stop_signal: int, grace: float) -> None:
    server.send_signal(stop_signal)
    try:
        server.wait(grace)
    except subprocess.TimeoutExpired:
        server.kill()


def main(arguments: list[str]) -> int:
    """Keep the server named by `arguments` until it ends."""
    uid, gid, stop_signal = (int(argument) for argument in arguments[:3])
    grace, command, me = float(arguments[3]), arguments[4:], os.getpid()
    # Ctrl-C reaches the whole process group; the owner decides when its server stops.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        _become(uid, gid)
        _follow_parent(stop_signal, me)

    server = subprocess.Popen(  # noqa: S603 - the command is put together by our caller
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        preexec_fn=prepare,  # noqa: PLW1509 - no thread runs yet
    )
    reading, writing = os.pipe()
    threading.Thread(target=lambda: (server.wait(), os.write(writing, b"x")), daemon=True).start()
    _tell(str(server.pid))
    _watch(server, reading, stop_signal, grace)
    code = server.wait()
    _tell(f"exit {code}")
    return 0


def _tell(line: str) -> None:
    # Nobody may be listening any more.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
