"""ServerProcess: a server that the engine starts, waits for, starts again when it dies, and takes down with itself.

It gets a free loopback port as `--host 127.0.0.1 --port N`, which llamafile, llama-server and most others
understand; another program may take that port first, and then it gets another. keeper.py stands between, so that no
end of this process leaves the server behind. Never through a shell that would read the arguments. This file knows
no HTTP: whether the server is ready is for the caller's `is_ready` to find out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from nanovllm.errors import ConfigError, RunnerDead, RunnerError
from nanovllm.progress import Waiting

from . import keeper
from .options import HttpOptions

log = logging.getLogger("nanovllm.http")

LOOPBACK = "127.0.0.1"
NUM_PORTS = 5  # tries at a port that nobody takes in between
PAUSES = (0.05, 1.0)  # seconds between two looks at a server that loads: at first, and at most
PROGRESS = 5.0  # seconds between two lines of progress in the log
DYING = 0.5  # seconds from a server's last connection to the end of its process
RESTARTS_WITHIN = 600.0  # seconds over which restarts are counted
MAX_LINES, MAX_LINE, SHOWN = 40, 500, 8  # of its output: lines kept, bytes of each, lines shown in an error
APE = (b"MZqFpD", b"jartsr")  # how an Actually Portable Executable begins; as a script it suits every sh

if sys.platform == "win32":
    _FLAGS = subprocess.CREATE_NEW_PROCESS_GROUP  # what a session is elsewhere: Ctrl-C does not reach it
else:
    _FLAGS = 0


class ServerProcess:
    def __init__(
        self,
        command: Sequence[str],
        is_ready: Callable[[str], bool],  # gets the URL; quick, and False as long as nothing answers
        *,
        start_timeout: float = 300.0,  # seconds until it must be ready: it loads a model
        max_restarts: int = 3,  # within RESTARTS_WITHIN
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts nothing yet. Raises ConfigError where there is no such program."""
        self.name = Path(command[0]).name
        self.url = ""  # of the server that runs, or ran last
        self._command = (*_program(command[0]), *command[1:])
        self._is_ready = is_ready
        self._start_timeout = start_timeout
        self._max_restarts = max_restarts
        self._clock = clock
        self._restarts: deque[float] = deque()  # when
        self._process: subprocess.Popen[bytes] | None = None  # its keeper
        self._reader: threading.Thread | None = None
        self._lines: deque[str] = deque(maxlen=MAX_LINES)  # what it said last
        self._lock = threading.Lock()  # one thread starts or stops it
        self._is_closing = threading.Event()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Start it and wait until it is ready; returns its URL. Raises RunnerError with what it said last."""
        with self._lock:
            return self._start()

    def revive(self, *, is_suspect: bool = False) -> str:
        """Its URL, after a restart if it has died. Raises RunnerError if that fails, RunnerDead once too often.

        `is_suspect`: a connection broke, so it may be dying at this moment.
        """
        with self._lock:
            if self.is_running and is_suspect and not self._is_ready(self.url):
                self._wait(DYING)
            if self.is_running:
                return self.url
            now = self._clock()
            while self._restarts and self._restarts[0] <= now - RESTARTS_WITHIN:
                self._restarts.popleft()
            if len(self._restarts) >= self._max_restarts:
                raise RunnerDead(
                    f"{self.name} {self._end()} after {len(self._restarts)} restarts within "
                    f"{RESTARTS_WITHIN / 60:g} minutes, all that runner.restarts allows",
                    hint=self._last_lines(),
                )
            self._restarts.append(now)
            log.warning("%s %s: restart %d of %d", self.name, self._end(), len(self._restarts), self._max_restarts)
            return self._start()

    def close(self) -> None:
        """Take it down, even while another thread starts it. Safe to call twice."""
        self._is_closing.set()
        with self._lock:
            self._stop()

    # ------------------------------------------------------------------------------- start and stop

    def _start(self) -> str:
        for _ in range(NUM_PORTS):
            self._stop()
            port = _free_port()
            self.url = f"http://{LOOPBACK}:{port}"
            try:
                self._launch("--host", LOOPBACK, "--port", str(port))
                if self._wait_until_ready():
                    return self.url
            except BaseException:
                self._stop()
                raise
            if _is_free(port):  # so that was not the reason
                break
        raise RunnerError(f"{self.name} {self._end()} before it was ready", hint=self._last_lines())

    def _launch(self, *arguments: str) -> None:
        if self._is_closing.is_set():
            raise RunnerError(f"{self.name} was closed")
        self._lines.clear()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", keeper.__file__, *self._command, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=sys.platform != "win32",
            creationflags=_FLAGS,
        )  # fmt: skip
        assert self._process.stdout is not None, "opened as a pipe"
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _wait_until_ready(self) -> bool:
        """False if it ended. Raises RunnerError when it takes too long, or when `close` came in between."""
        start = told = self._clock()
        pause, longest = PAUSES
        with Waiting(f"{self.name} is starting") as line:
            while self.is_running:
                # It must still run after the answer, or else another program has the port and answered.
                if self._is_ready(self.url) and self.is_running:
                    log.info("%s is ready at %s after %.1f s", self.name, self.url, self._clock() - start)
                    return True
                if self._is_closing.wait(pause):
                    raise RunnerError(f"{self.name} was closed before it was ready")
                pause = min(2 * pause, longest)
                now = self._clock()
                said = self._lines[-1] if self._lines else "it has said nothing yet"
                line.update(f"{self.name} is starting, {now - start:.0f} s: {said}")
                if now - told >= PROGRESS:
                    told = now
                    log.info("%s is starting, %.0f s: %s", self.name, now - start, said)
                if now - start >= self._start_timeout:
                    raise RunnerError(
                        f"{self.name} was not ready after {self._start_timeout:g} s (runner.startup_timeout)",
                        hint=self._last_lines(),
                    )
        return False

    def _stop(self) -> None:
        process, reader = self._process, self._reader
        if process is None or reader is None:
            return
        assert process.stdin is not None, "opened as a pipe"
        if process.stdin.closed:
            return  # done before; its number may be another process's now
        if process.poll() is not None and process.returncode < 0:
            _kill(process)  # somebody killed the keeper: the server may be running
        with contextlib.suppress(OSError):
            process.stdin.close()  # which tells the keeper
        self._wait(2 * keeper.GRACE)
        if self.is_running:
            _kill(process)
            process.wait()
        reader.join(1.0)  # it ends with the pipe, which a child that left the group may hold

    def _wait(self, seconds: float) -> None:
        """Until it ends, but no longer."""
        assert self._process is not None, "asked after a start"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    # -------------------------------------------------------------------------------- what it says

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            while line := pipe.readline(MAX_LINE):
                text = "".join(c if c.isprintable() else " " for c in line.decode("utf-8", "replace")).strip()
                if text:
                    self._lines.append(text)
                    log.debug("%s: %s", self.name, text)

    def _end(self) -> str:
        assert self._process is not None, "asked after a start"
        status = self._process.wait()
        number = -status if status < 0 else status - 128  # of the keeper's end, or as it tells the server's
        if 0 < number < signal.NSIG:
            return f"was ended by signal {number} ({signal.strsignal(number)})"
        return f"ended with status {status}"

    def _last_lines(self) -> str:
        if self._reader is not None:
            self._reader.join(1.0)  # of a server that has ended: until all is read
        last = list(self._lines)[-SHOWN:]
        return "its last lines:" + "".join(f"\n    {line}" for line in last) if last else "it said nothing"


def server_command(options: HttpOptions) -> list[str]:
    """The program that the options say to start, and its arguments but for the address."""
    if options.llamafile is None:
        return [*options.command, *options.args]
    # Without --server new ones also chat in the terminal; --nobrowser is refused by 0.10 (mozilla-ai/llamafile#955).
    return [str(options.llamafile.absolute()), "--server", *options.args]


def _program(name: str) -> tuple[str, ...]:
    """How to start it, without its arguments. Raises ConfigError."""
    path = shutil.which(name)
    if path is None:
        if Path(name).is_file():
            raise ConfigError(f"{name} is not an executable file", hint=f"run: chmod +x {name}")
        raise ConfigError(
            f"there is no program {name!r}" + ("" if os.path.dirname(name) else " on PATH"),
            hint="install it, or write its path",
        )
    with open(path, "rb") as file:
        is_ape = file.read(6) in APE
    # Kernels do not know the format and binfmt handlers take it for a Windows program; a POSIX shell runs it as a
    # script that starts its own loader (mozilla-ai/llamafile#47, #80, #311).
    return ("/bin/sh", path) if is_ape and sys.platform != "win32" else (path,)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        if sys.platform != "win32":  # there it means something else
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
