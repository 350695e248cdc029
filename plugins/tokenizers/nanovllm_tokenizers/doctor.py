"""`examine`: the libraries of the tokenizers for `nanovllm doctor`, and the sandbox of the chat templates."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module, metadata

from nanovllm.doctor import Case, Finding

from .chat import ChatTemplate

# The library of each `tokenizer: NAME`, and what pip installs for it.
LIBRARIES = {
    "hf": ("tokenizers", "nanovllm-tokenizers"),
    "sentencepiece": ("sentencepiece", "nanovllm-tokenizers[sentencepiece]"),
    "tiktoken": ("tiktoken", "nanovllm-tokenizers[tiktoken]"),
}
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"


def examine(case: Case) -> Iterator[Finding]:
    for name, (library, target) in LIBRARIES.items():
        try:
            import_module(library)
        except ImportError as e:
            is_needed = name == "hf" or case.is_chosen("tokenizer", name)
            told = f"tokenizer '{name}' needs {library}, which cannot be imported ({e})"
            yield Finding("error" if is_needed else "note", told, f"pip install '{target}'")
        else:
            yield Finding("ok", f"tokenizer '{name}' has {library} {metadata.version(library)}")
    messages = [{"role": "user", "content": "hello"}]
    text = ChatTemplate(TEMPLATE, "nanovllm doctor").render({"messages": messages})
    if text == "user: hello":
        yield Finding(
            "ok", f"chat templates are rendered in a process of their own, by jinja2 {metadata.version('jinja2')}"
        )
    else:
        yield Finding("error", f"a chat template gave {text!r:.60}", "pip install --force-reinstall jinja2")
