"""Four chat templates for directories that have none (row B-15): llama3, falcon, granite, completion.

They write what nano-vllm-go writes for one question, and continue it for a conversation. This file
knows no tokenizer and renders nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import NamedTuple


class BuiltIn(NamedTuple):
    source: str  # jinja
    controls: tuple[str, ...]  # the control tokens that it writes: a vocabulary without them cannot be meant


# As Meta's own, without its date lines: contents are stripped.
_LLAMA3 = (
    "<|begin_of_text|>"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt -}}"
)

# Plain text with speakers: nothing but the words keeps a user from writing the other's lines.
_FALCON = (
    "{%- for message in messages -%}"
    "{{- {'user': 'User: ', 'assistant': 'Assistant: '}.get(message.role, '') + message.content + '\n' -}}"
    "{%- endfor -%}"
    "{{- 'Assistant:' if add_generation_prompt -}}"
)

_GRANITE = (
    "{%- set default = 'You are a helpful assistant. "
    "Please ensure responses are professional, accurate, and safe.' -%}"
    "{%- set first = [] if messages[0].role == 'system' else [{'role': 'system', 'content': default}] -%}"
    "{%- for message in first + messages -%}"
    "{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\n' -}}"
    "{%- endfor -%}"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' if add_generation_prompt -}}"
)

# For base models: the conversation is a text to continue, encoded as a plain prompt is.
_COMPLETION = "{{ messages | map(attribute='content') | join('\n') }}"

BUILT_IN = MappingProxyType(
    {
        "llama3": BuiltIn(_LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
        "falcon": BuiltIn(_FALCON, ()),
        "granite": BuiltIn(_GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")),
        "completion": BuiltIn(_COMPLETION, ()),
    }
)


def lacking(name: str, vocabulary: Collection[str]) -> list[str]:
    """The control tokens of a built-in template that the vocabulary does not have."""
    return [token for token in BUILT_IN[name].controls if token not in vocabulary]


def fitting(vocabulary: Collection[str]) -> str | None:
    """The built-in template whose control tokens are all there; never one that has none, which fits anything."""
    return next((name for name, t in BUILT_IN.items() if t.controls and not lacking(name, vocabulary)), None)
