"""The dialect `nanovllm`: who speaks it, and how much of it. Its steps are step.py's, its messages wire.py's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.batch import ALL_PARAMETERS
from nanovllm.errors import ConfigError

from .. import wire
from ..errors import UpstreamError, one_line
from . import Exchange, Facts
from .shared import MAX_COUNT, asked, check_same_vocabulary, count, field, found

if TYPE_CHECKING:
    from nanovllm.batch import ScheduledSeq
    from nanovllm.tokenizer import Tokenizer

    from ..transport import Transport

# What the seeds' words carry, and what the engine sees to by itself.
_PLAIN = frozenset(["temperature", "max_tokens", "stop", "stop_token_ids", "ignore_eos"])
_ABSENT = (404, 405, 501)


class NanoVLLM:
    name = "nanovllm"
    supports = ALL_PARAMETERS
    extra_fields: frozenset[str] = frozenset()

    def __init__(self, tokenizer: Tokenizer | None = None, *, is_named: bool = False) -> None:
        self._tokenizer = tokenizer
        self.is_named = is_named  # by the configuration, so that little proof is needed

    def probe(self, transport: Transport) -> Facts | None:
        """Ours says so under /info. An older one has /v1/inference or /inference and may say nothing of itself."""
        info = found(transport, "/info")
        if info is not None and info.get("protocol") == wire.PROTOCOL:
            facts = _facts(info, transport.url)
            size = info.get("tokenizer_vocab_size")  # of one without a tokenizer nothing can be asked
            if self._tokenizer is not None and type(size) is int:
                check_same_vocabulary(
                    transport.url,
                    self._tokenizer,
                    size,
                    lambda ids: field(asked(transport, "/v1/detokenize", {"token_ids": ids}), "text", str),
                )
            return facts
        for kind, path, body in (
            ("sequences", wire.STEP_PATH, wire.sequences_json([], is_prefill=True)),
            ("batch", wire.BATCH_PATH, wire.batch_json([], 0.0, is_prefill=True)),
        ):
            if self._has(transport, path, body):
                return Facts(dialect=self.name, kind=kind, takes_text=False, lacks=ALL_PARAMETERS - _PLAIN)
        return None

    def _has(self, transport: Transport, path: str, body: Mapping[str, Any]) -> bool:
        """Is there such a path? Asked about no sequences at all, an old server may fail, and has it all the same."""
        try:
            return wire.read_tokens(transport.post(path, body, retries=0), 0, None) == []
        except wire.WireError:
            return False
        except UpstreamError as e:
            if e.status is None or e.status in (401, 403, 503):
                raise
            return self.is_named and e.status not in _ABSENT

    def exchange(self, seq: ScheduledSeq, facts: Facts, extra: Mapping[str, Any]) -> Exchange:
        raise ConfigError(
            "a server of dialect nanovllm computes steps, not whole answers", hint="set runner.mode: step"
        )


def _facts(info: dict[str, Any], url: str) -> Facts:
    def field(name: str, is_right: bool) -> Any:
        if not is_right:
            raise UpstreamError(f"{url} says of itself that {name} is {one_line(repr(info.get(name)), 60)}")
        return info.get(name)

    def positive(name: str) -> Any:
        value = info.get(name)
        return field(name, value is None or count(value) is not None)

    def listed(name: str, kind: type) -> Any:
        value = info.setdefault(name, [])
        return field(
            name,
            isinstance(value, list)
            and all(type(item) is kind for item in value)
            and (kind is str or all(0 <= item <= MAX_COUNT for item in value)),
        )

    is_extended = wire.VERSION in listed("versions", int)
    supported = frozenset(listed("supports", str)) if is_extended else _PLAIN
    model = info.get("model")
    return Facts(
        dialect=wire.PROTOCOL,
        kind="extended" if is_extended else "sequences",
        model=field("model", model is None or isinstance(model, str)),
        vocab_size=positive("vocab_size"),
        max_model_len=positive("max_model_len"),
        num_slots=positive("max_num_seqs"),
        eos_ids=tuple(listed("eos_token_ids", int)),
        takes_text=False,
        lacks=ALL_PARAMETERS - supported,
        description={"server": url, "versions": tuple(info.get("versions", ()))},
    )
