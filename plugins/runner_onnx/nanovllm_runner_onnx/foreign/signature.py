"""`read_signature`: what a decoder graph's inputs and outputs mean, by their names, types and shapes.

Known are the conventions of Hugging Face optimum (`past_key_values.0.key` -> `present.0.key`, merged decoders
with `use_cache_branch`), of onnxruntime-genai (the same, or whatever its configuration says) and of older
GPT-2 exports (`past_0` -> `present_0`, keys and values in one tensor). File names do not matter. Each past
is paired with its present by the whole name, so what is a key and what a value need not be known. Knows no
session: whether the graph keeps these promises is for `probe.py` to find out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nanovllm.errors import ModelError, UnsupportedModelError
from nanovllm_models.lanes import REFUSED_INPUTS, Past

from ..genai_config import GenaiConfig
from ..onnx_file import Header, Value

INPUTS = ("input_ids", "attention_mask", "position_ids", "num_logits_to_keep", "use_cache_branch")
TEMPLATES = (("past_key_names", "present_key_names"), ("past_value_names", "present_value_names"),
             ("past_names", "present_names"))  # fmt: skip
EXPORT = "export the text decoder with token ids, attention mask, position ids and keys and values of the past"
MAX_TOKEN_BYTES = 2**22  # in one tensor of the past, far more than any model has


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    ids: Value  # (B, S)
    mask: Value | None  # (B, past + S)
    positions: Value | None  # (B, S)
    num_logits: Value | None  # () how many columns get logits, from the right; 0 = all
    use_cache: str | None  # the switch of a merged graph: (1,) bool, false = the past is not looked at
    logits: Value  # (B, S or 1, vocab) or (B, vocab)
    past: tuple[Past, ...]

    @property
    def style(self) -> str:
        """For people."""
        if not self.past:
            return "no past"
        if self.use_cache is not None:
            return "merged decoder"
        return "past and present" if len(self.past[0].sizes) == 4 else "past and present in one tensor per layer"


def read_signature(header: Header, genai: GenaiConfig | None) -> Signature:
    """`genai`: says what inputs and outputs are called, and the size of a head where the graph leaves it open.

    Raises UnsupportedModelError for a graph that is no decoder of the kinds above, naming the input that says
    so, and ModelError for one that contradicts itself.
    """
    names = {} if genai is None else genai.names
    inputs = {v.name: v for v in header.inputs}
    outputs = {v.name: v for v in header.outputs}
    roles = {role: names.get(role, role) for role in (*INPUTS, "logits")}
    known = {role: inputs.get(roles[role]) for role in INPUTS}
    past = _pairs(header, [v for v in inputs.values() if v not in known.values()], outputs, genai)
    ids, switch = known["input_ids"], known["use_cache_branch"]
    if ids is None:
        raise UnsupportedModelError(
            f"{header.path} has no input {roles['input_ids']!r}; it has {_listed(inputs)}", hint=EXPORT
        )
    for value in (ids, known["attention_mask"], known["position_ids"]):
        if value is None:
            continue
        types = ("int32", "int64", "bool") if value is known["attention_mask"] else ("int32", "int64")
        if value.dtype not in types or len(value.shape) != 2:
            raise UnsupportedModelError(
                f"{header.path}: the input {value.name!r} is {value.dtype} {_shown(value)}, "
                f"where {' or '.join(types)} (batch, tokens) is understood",
                hint=EXPORT,
            )
    num_logits = known["num_logits_to_keep"]
    if num_logits is not None and num_logits.dtype not in ("int32", "int64"):
        raise ModelError(f"{header.path}: {num_logits.name!r} is {num_logits.dtype}, no number of tokens", hint=EXPORT)
    if switch is not None and (switch.dtype != "bool" or not past):
        raise ModelError(f"{header.path}: {switch.name!r} is no switch between two branches", hint=EXPORT)
    logits = outputs.get(roles["logits"])
    if logits is None or logits.dtype not in ("float32", "float16"):
        raise UnsupportedModelError(
            f"{header.path} has no output {roles['logits']!r} of type float32 or float16; it has {_listed(outputs)}",
            hint="export it for text generation",
        )
    return Signature(
        ids=ids,
        mask=known["attention_mask"],
        positions=known["position_ids"],
        num_logits=num_logits,
        use_cache=None if switch is None else switch.name,
        logits=logits,
        past=past,
    )


def _pairs(
    header: Header, inputs: Iterable[Value], outputs: Mapping[str, Value], genai: GenaiConfig | None
) -> tuple[Past, ...]:
    """Every one of the inputs with the output that continues it."""
    pairs: list[Past] = []
    taken: set[str] = set()  # outputs
    for value in inputs:
        for part, what in REFUSED_INPUTS.items():
            if part in value.name:
                raise UnsupportedModelError(f"{header.path} {what}: it has an input {value.name!r}", hint=EXPORT)
        candidates = _presents(value.name, {} if genai is None else genai.names)
        if not candidates or len(value.shape) not in (4, 5):
            raise UnsupportedModelError(
                f"{header.path} has an input {value.name!r}, {value.dtype} {_shown(value)}, that nobody here knows",
                hint=EXPORT,
            )
        present = next((outputs[c] for c in candidates if c in outputs and c not in taken), None)
        if present is None:
            raise ModelError(
                f"{header.path}: the input {value.name!r} has no output that continues it; "
                f"{' or '.join(map(repr, candidates))} was expected",
                hint="export it with use_cache, or correct the names in genai_config.json",
            )
        taken.add(present.name)
        pairs.append(_pair(header, value, present, None if genai is None else genai.head_size))
    strays = sorted(o for o in outputs if o.startswith("present") and o not in taken)
    if pairs and strays:
        raise ModelError(f"{header.path}: the output {strays[0]!r} continues no input", hint="export it again")
    return tuple(pairs)


def _presents(past: str, names: Mapping[str, str]) -> list[str]:
    """What the output may be called that continues the input; nothing if that is no past."""
    for past_role, present_role in TEMPLATES:
        if past_role in names and present_role in names:
            pattern = re.escape(names[past_role]).replace("%d", r"(\d+)")
            if match := re.fullmatch(pattern, past):
                return [names[present_role].replace("%d", match[1])]
    return list(dict.fromkeys(past.replace(p, "present", 1) for p in ("past_key_values", "past") if p in past))


def _pair(header: Header, past: Value, present: Value, head_size: int | None) -> Past:
    shape, batch_axis = past.shape, len(past.shape) - 4  # in front of it: keys and values
    if head_size is not None and not isinstance(shape[-1], int):
        shape = (*shape[:-1], head_size)
    varying = [i for i, n in enumerate(shape) if not isinstance(n, int) and i != batch_axis]
    if past.dtype not in ("float32", "float16") or len(varying) != 1:
        raise UnsupportedModelError(
            f"{header.path}: the input {past.name!r} is {past.dtype} {_shown(past)}; understood are float32 and "
            "float16 with exactly one size, the number of tokens, that varies beside the batch",
            hint="export it with dynamic lengths and a fixed number and size of heads",
        )
    fixed = [[n for n in v.shape if isinstance(n, int)] for v in (past, present)]
    if present.dtype != past.dtype or len(present.shape) != len(past.shape) or fixed[0] != fixed[1]:
        raise ModelError(
            f"{header.path}: {past.name!r} is {past.dtype} {_shown(past)}, but {present.name!r}, which continues it, "
            f"is {present.dtype} {_shown(present)}",
            hint="export it again",
        )
    sizes = tuple(n if isinstance(n, int) and i != batch_axis else 1 for i, n in enumerate(shape))
    pair = Past(past.name, present.name, past.dtype, sizes, batch_axis, varying[0])
    if not 0 < pair.token_bytes <= MAX_TOKEN_BYTES:
        raise ModelError(
            f"{header.path}: a token takes {pair.token_bytes:,} bytes in {past.name!r}, {_shown(past)}",
            hint="correct head_size in genai_config.json, or export it again",
        )
    return pair


def _shown(value: Value) -> str:
    return f"({', '.join(str(n or '?') for n in value.shape)})"


def _listed(names: Iterable[str]) -> str:
    """The first of them."""
    return ", ".join(repr(n) for n in list(names)[:6]) or "none"
