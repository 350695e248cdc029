"""The process that renders chat templates: one JSON request per line in, one JSON reply per line out.

A template comes with a model, from anyone. Jinja's sandbox keeps it away from Python's internals, but
no in-process rule bounds its time and memory: nested loops, 9**9**9 and doubling lists all run inside C
calls. So it runs here, where memory is limited and the parent (chat.py) may kill at any moment.

    request  {"template": str, "variables": {...}, "now": ISO time}
    reply    {"text": str} | {"refused": str} the template's own raise_exception | {"error": str}

Run by path, so that it imports jinja2 and nothing of nanovllm.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARS = 4 << 20  # of a rendered conversation
MAX_MEMORY = 1 << 30  # bytes of address space, where the system can limit it


class _Refused(TemplateError):
    """What a template says about messages that it does not take."""


class _Generation(Extension):
    """`{% generation %}` marks training targets; for inference its body is just its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's interface)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's namespace() stores any attribute; one with a leading underscore is a way out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: Any, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a template may not store {name!r} on a namespace")


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: Any = False):
    # Jinja's own filter escapes HTML characters, which a model must not see.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


@lru_cache(maxsize=1)
def _compile(source: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    # The plain functions that templates may call; a lambda, so that dict's own attributes stay out of reach.
    environment.globals = {
        "range": environment.globals["range"],
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
    }
    return environment.from_string(source)


def render(request: dict[str, Any]) -> dict[str, str]:
    """The reply to one request. Never raises."""
    try:
        now = datetime.fromisoformat(request["now"])
        text, size = [], 0
        for part in _compile(request["template"]).generate(strftime_now=now.strftime, **request["variables"]):
            text.append(part)
            size += len(part)
            if size > MAX_CHARS:
                return {"error": f"it writes more than {MAX_CHARS} characters"}
        return {"text": "".join(text)}
    except _Refused as e:
        return {"refused": str(e)}
    except RecursionError:
        return {"error": "it recurses too deeply"}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as e:  # a template can raise anything; the reply carries it
        return {"error": f"{type(e).__name__}: {e}"[:500]}


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # not on this system; the parent's time limit still holds
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(render(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
