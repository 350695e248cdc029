"""Chat templates: finding a model's, and rendering it in a process of its own (sandbox.py).

This file knows no tokenizer: a conversation goes in, text comes out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.errors import RequestError, TokenizerError

from .files import read_object, read_text
from .templates import BUILT_IN, fitting, lacking

MAX_SECONDS = 10.0  # for one conversation, the start of the process included


def choose_template(
    option: str | None, directory: Path | None, config: dict[str, Any], vocabulary: Collection[str]
) -> ChatTemplate | None:
    """The option's template, a built-in one's name or a file; else the directory's own; else a built-in one
    whose control tokens are all in the vocabulary; else None.

    Raises TokenizerError for a file that cannot be read, and for a built-in one whose control tokens are not there.
    """
    if option in BUILT_IN:
        if missing := lacking(option, vocabulary):
            raise TokenizerError(
                f"the chat template '{option}' writes {', '.join(missing)}, which the vocabulary does not have",
                hint="set tokenizer.chat_template to another one: " + ", ".join(BUILT_IN) + ", or a jinja file",
            )
        name = option
    elif option is not None:
        file = Path(option).expanduser()
        return ChatTemplate(read_text(file), str(file))
    elif found := directory and find_template(directory, config):
        return ChatTemplate(found[0], str(found[1]))
    else:
        name = fitting(vocabulary)
    if name is None:
        return None
    return ChatTemplate(BUILT_IN[name].source, f"the built-in {name}", writes_plain_prompt=name == "completion")


def find_template(directory: Path, config: dict[str, Any]) -> tuple[str, Path] | None:
    """The directory's chat template and the file it is in: *.jinja, *.json, or tokenizer_config.json."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return read_text(file), file
    file = directory / "chat_template.json"
    if file.exists():
        template = read_object(file).get("chat_template")
    else:
        file = directory / "tokenizer_config.json"
        template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t["name"]: t.get("template") for t in template if isinstance(t, dict) and "name" in t}
        if "default" not in named:
            raise TokenizerError(
                f"{file} has the chat templates {sorted(map(str, named))} and none named 'default'",
                hint="save the one to use as a file and set tokenizer.chat_template to its path",
            )
        template = named["default"]
    if template is None:
        return None
    if not isinstance(template, str):
        raise TokenizerError(
            f"{file}: chat_template must be text, not {type(template).__name__}",
            hint="set tokenizer.chat_template to the path of a jinja file",
        )
    return template, file


class _Worker(NamedTuple):
    process: Any  # subprocess.Popen with both pipes
    stop: weakref.finalize  # ends it; also runs when the template is dropped and at exit
    owner: int  # the process that started it: after a fork, the child starts its own


class ChatTemplate:
    """One template. Threads may share it; conversations are rendered one at a time."""

    def __init__(
        self, source: str, name: str, max_seconds: float = MAX_SECONDS, *, writes_plain_prompt: bool = False
    ) -> None:
        self.source = source
        self.name = name  # where it came from, for errors
        self.writes_plain_prompt = writes_plain_prompt  # so the tokenizer adds BOS and the like, as to any prompt
        self.max_seconds = max_seconds
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(self, variables: dict[str, Any], now: datetime | None = None) -> str:
        """The conversation as text.

        `variables` are JSON values: messages, add_generation_prompt, bos_token and so on. Raises
        RequestError if the template refuses the messages, TokenizerError if it fails or takes too long.
        """
        request = {
            "template": self.source,
            "variables": variables,
            "now": (now or datetime.now()).isoformat(),
        }
        with self._lock:
            reply = self._ask(json.dumps(request).encode() + b"\n")
        if "refused" in reply:
            raise RequestError(f"the chat template does not take these messages: {reply['refused']}")
        if "error" in reply:
            raise TokenizerError(
                f"the chat template of {self.name} failed: {reply['error']}",
                hint="set tokenizer.chat_template to a corrected jinja file",
            )
        return reply["text"]

    def _ask(self, line: bytes) -> dict[str, str]:
        if self._worker is None or self._worker.owner != os.getpid():
            self._worker = self._start()
        process, stop, _ = self._worker
        timer = threading.Timer(self.max_seconds, process.kill)
        timer.daemon = True
        timer.start()
        answer = b""
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            pass  # it died: no answer
        finally:
            timer.cancel()
            if not answer.endswith(b"\n"):  # killed, crashed or interrupted: never reuse a pipe that is half read
                self._worker = None
                stop()
        if not answer.endswith(b"\n"):
            return {"error": f"it gave no answer within {self.max_seconds:g} s, or ran out of memory"}
        return json.loads(answer)

    def _start(self) -> _Worker:
        script = Path(__file__).with_name("sandbox.py")
        try:
            process = subprocess.Popen(
                [sys.executable, str(script)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as e:
            raise TokenizerError(f"cannot start {sys.executable!r} to render chat templates: {e}") from e
        return _Worker(process, weakref.finalize(self, _end, process, os.getpid()), os.getpid())


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return  # a forked copy of the parent must leave the parent's worker alone
    process.kill()
    process.communicate()  # closes the pipes and waits
