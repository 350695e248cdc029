"""`nanovllm ...` in a pseudo-terminal: typing keys, Ctrl-C among them, and waiting for what appears."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

# The pseudo-terminal becomes the controlling one, so that Ctrl-C reaches the program as a signal.
PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.argv[0] = "nanovllm"
from nanovllm.cli import main
main()
"""


HANG = 60  # seconds after which a test fails instead of waiting on


class Terminal:
    """`nanovllm ...` in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.screen, self._read = "", 0
        self._keys, theirs = os.openpty()
        environment = {k: v for k, v in os.environ.items() if k not in ("MODEL_PATH", "TOKENIZER_PATH")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=environment | {"TERM": "dumb", "INPUTRC": os.devnull, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keys)

    def type(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def wait_for(self, text: str) -> str:
        """What appears from here on up to and with `text`."""
        while (at := self.screen.find(text, self._read)) < 0:
            assert self._more(), f"ended without {text!r}:\n{self.screen}"
        seen, self._read = self.screen[self._read : at + len(text)], at + len(text)
        return seen

    def wait_for_more(self, characters: int) -> None:
        while len(self.screen) < self._read + characters:
            assert self._more(), f"ended early:\n{self.screen}"

    def status(self) -> int:
        while self._more():
            pass
        return self.process.wait()

    def leave_with(self, key: str) -> int:
        """Press a key that ends the program, again if need be: CPython's readline misses a signal that comes
        between prompt and reading. The program's farewell is a line's end."""
        for _ in range(HANG // 2):
            self.type(key)
            while "\n" not in self.screen[self._read :] and select.select([self._keys], [], [], 2)[0]:
                if not self._more():
                    return self.process.wait()
            if "\n" in self.screen[self._read :]:
                return self.status()
        raise AssertionError(f"it did not end for {HANG} s:\n{self.screen}")

    def _more(self) -> bool:
        """Wait for output; False at its end."""
        assert select.select([self._keys], [], [], HANG)[0], f"nothing came for {HANG} s:\n{self.screen}"
        try:
            data = os.read(self._keys, 4096)
        except OSError:  # Linux's end of file of a pseudo-terminal
            return False
        self.screen += data.decode().replace("\r\n", "\n")
        return bool(data)


needs_terminal = pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
