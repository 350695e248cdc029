"""The process between an engine and the server that it started: when the engine goes, in whatever way, the server goes.

    python -I -S keeper.py PROGRAM ARGUMENT...

Its stdin is a pipe whose other end only the engine holds, so that end of file means: closed on purpose, or the
engine is no more, be it by SIGKILL. (Linux can tie a child to its parent, but to the parent's *thread*.) On POSIX
it leads a group of its own with the server in it: Ctrl-C in a terminal reaches neither, and whoever outlives the
other can end all. Its status is the server's, 128 + n for a signal. Run by path; imports nothing of nanovllm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE = 5.0  # seconds that the server has to end by itself
CANNOT_START = 127  # the status that a shell gives for it


def main(command: list[str]) -> int:
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as e:
        print(f"{command[0]} cannot be started: {e.strerror or e}", file=sys.stderr)
        return CANNOT_START
    if sys.platform != "win32":
        # After the start, because a server would inherit it: the group is told to end, this process stays to see to it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    is_ending = threading.Event()
    threading.Thread(target=_end_with_the_server, args=(server, is_ending), daemon=True).start()
    while os.read(0, 1):
        pass
    is_ending.set()
    _terminate(server)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE)
    if sys.platform != "win32":
        os.killpg(0, signal.SIGKILL)  # what the server started, too; and this process
    server.kill()
    return server.wait()


def _end_with_the_server(server: subprocess.Popen[bytes], is_ending: threading.Event) -> None:
    status = server.wait()
    if not is_ending.is_set():
        _terminate(server)
        os._exit(status if status >= 0 else 128 - status)


def _terminate(server: subprocess.Popen[bytes]) -> None:
    if sys.platform != "win32":
        os.killpg(0, signal.SIGTERM)
    else:
        server.terminate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
