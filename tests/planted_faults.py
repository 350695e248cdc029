"""Plugins with one fault each, for `nanovllm compare` to name. Entry points lead here; no test is in this file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import BaseModel

from nanovllm.batch import ALL_PARAMETERS, Batch, FloatArray, Packed, RunnerInfo, Sampled, SampleRow, SeqOutput
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.errors import TokenizerError
from nanovllm.hookspecs import Context, hookimpl
from nanovllm.runner import ModelRunner, Sampler
from nanovllm.sampler import NumpySampler
from nanovllm.tokenizer import Tokenizer


class OtherTemplate(SimpleBPETokenizer):
    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages))


class OtherControls(SimpleBPETokenizer):
    """The same text behind a control token."""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return [1, *super().chat(messages)]


class NoTemplate(SimpleBPETokenizer):
    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        raise TokenizerError("the model's directory has no chat template")


class Letters(SimpleBPETokenizer):
    """Merges nothing to words."""

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return [i for c in text for i in super(Letters, self).encode(c)]


class OtherBytes(SimpleBPETokenizer):
    """The space is an underscore."""

    def token_bytes(self, token_id: int) -> bytes:
        return super().token_bytes(token_id).replace(b" ", b"_")


class OtherEnd(SimpleBPETokenizer):
    def __init__(self) -> None:
        super().__init__(eos_id=1)


class NoEnd(SimpleBPETokenizer):
    def __init__(self) -> None:
        super().__init__()
        self.eos_ids = ()


class NewlineBehind(SimpleBPETokenizer):
    """The template ends in a line break."""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return [*super().chat(messages), *self.encode("\n")]


class StripsSpaces(SimpleBPETokenizer):
    """From what it shows, not from what it reads."""

    def token_bytes(self, token_id: int) -> bytes:
        return super().token_bytes(token_id).strip(b" ")


class RaisesAt(BaseModel):
    method: str


class Raises(SimpleBPETokenizer):
    """An exception that is none of ours."""

    def __init__(self, at: RaisesAt) -> None:
        super().__init__()
        self._method = at.method

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return self._unless("encode", super().encode(text, parse_special))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self._unless("chat", super().chat(messages))

    def token_bytes(self, token_id: int) -> bytes:
        return self._unless("token_bytes", super().token_bytes(token_id))

    def _unless(self, method: str, value: Any) -> Any:
        if method == self._method:
            raise KeyError("its vocabulary")
        return value


class OtherTypes(SimpleBPETokenizer):
    """NumPy's numbers, and an id beyond its own vocabulary."""

    vocab_size = np.int64(SimpleBPETokenizer.vocab_size)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.eos_ids = (np.int64(2),)  # type: ignore[assignment]

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return list(np.array([126] if text == "beyond" else super().encode(text, parse_special)))


class WithBOS(SimpleBPETokenizer):
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return [1, *super().encode(text, parse_special)]


class Nudge(BaseModel):
    token: int
    amount: float
    from_length: int = 0  # only rows of contexts at least this long


class Nudged(MockRunner):
    """One token's logit is off by a known amount."""

    def __init__(self, nudge: Nudge) -> None:
        super().__init__()
        self._nudge = nudge

    def forward(self, packed: Packed) -> FloatArray:
        logits = super().forward(packed)
        lengths = packed.positions[packed.rows] + 1
        logits[lengths >= self._nudge.from_length, self._nudge.token] += np.float32(self._nudge.amount)
        return logits


class Described(MockRunner):
    """By what JSON does not have."""

    @property
    def info(self) -> RunnerInfo:
        return replace(super().info, description={"dtype": np.dtype("float32"), "mode": float("nan")})


class Changed(MockRunner):
    """`change` makes other logits of the (rows, vocab) ones."""

    def __init__(self, change: Callable[[FloatArray], FloatArray]) -> None:
        super().__init__()
        self._change = change

    def forward(self, packed: Packed) -> FloatArray:
        return self._change(super().forward(packed))


def coarse_logits(logits: FloatArray) -> FloatArray:
    """Of four values, so that the best of them is a tie of many."""
    return np.floor(logits / 4)


def swapped_logits(logits: FloatArray) -> FloatArray:
    """Two ids in each other's place."""
    logits[:, [26, 28]] = logits[:, [28, 26]]
    return logits


def spaceless_logits(logits: FloatArray) -> FloatArray:
    """One id has no probability at all."""
    logits[:, SimpleBPETokenizer().encode(" ")] = -np.inf
    return logits


class Opaque(ModelRunner):
    """Tokens and nothing else, as some servers give them."""

    def __init__(self, nudge: Nudge) -> None:
        self._inner = Nudged(nudge)
        self._inner.sampler = NumpySampler()

    @property
    def info(self) -> RunnerInfo:
        return replace(self._inner.info, supports=ALL_PARAMETERS - {"logprobs", "prompt_logprobs", "seed"})

    def execute(self, batch: Batch) -> list[SeqOutput]:
        return self._inner.execute(batch)


class LastOfTies(NumpySampler):
    def sample(self, logits: Any, rows: Sequence[SampleRow]) -> Sampled:
        flipped = logits[:, ::-1]
        return Sampled((logits.shape[1] - 1 - flipped.argmax(axis=1)).tolist(), None, {})


class Ignores(NumpySampler):
    """Draws with these parameters, whatever the request's are."""

    def __init__(self, **params: Any) -> None:
        self._params = params

    def sample(self, logits: Any, rows: Sequence[SampleRow]) -> Sampled:
        def without(row: SampleRow) -> SampleRow:
            return row._replace(sampling=row.sampling._replace(params=replace(row.sampling.params, **self._params)))

        return super().sample(logits, [without(row) for row in rows])


class Fails(NumpySampler):
    def sample(self, logits: Any, rows: Sequence[SampleRow]) -> Sampled:
        raise KeyError("its row")


class DrawsItself(ModelRunner):
    """Shows log-probabilities, and ignores the repetition penalty that it claims to know."""

    def __init__(self) -> None:
        self._inner = MockRunner()
        self._inner.sampler = Ignores(repetition_penalty=1.0)

    @property
    def info(self) -> RunnerInfo:
        return self._inner.info

    def execute(self, batch: Batch) -> list[SeqOutput]:
        return self._inner.execute(batch)


class TokenizerPlugin:
    api_version = 1

    def __init__(self, make: type[SimpleBPETokenizer]) -> None:
        self._make = make

    @hookimpl
    def create_tokenizer(self, ctx: Context) -> Tokenizer:
        return self._make()


class RaisesPlugin:
    api_version = 1

    @hookimpl
    def tokenizer_config(self) -> type[BaseModel]:
        return RaisesAt

    @hookimpl
    def create_tokenizer(self, ctx: Context) -> Tokenizer:
        return Raises(ctx.options)


class SamplerPlugin:
    api_version = 1

    def __init__(self, make: Callable[[], Sampler]) -> None:
        self._make = make

    @hookimpl
    def create_sampler(self, ctx: Context) -> Sampler:
        return self._make()


class RunnerPlugin:
    api_version = 1

    def __init__(self, make: Callable[[], ModelRunner]) -> None:
        self._make = make

    @hookimpl
    def create_runner(self, ctx: Context) -> ModelRunner:
        return self._make()


class NudgedPlugin:
    api_version = 1

    def __init__(self, make: Callable[[Nudge], ModelRunner]) -> None:
        self._make = make

    @hookimpl
    def runner_config(self) -> type[BaseModel]:
        return Nudge

    @hookimpl
    def create_runner(self, ctx: Context) -> ModelRunner:
        return self._make(ctx.options)


other_template = TokenizerPlugin(OtherTemplate)
other_controls = TokenizerPlugin(OtherControls)
newline_behind = TokenizerPlugin(NewlineBehind)
no_template = TokenizerPlugin(NoTemplate)
letters = TokenizerPlugin(Letters)
other_bytes = TokenizerPlugin(OtherBytes)
strips_spaces = TokenizerPlugin(StripsSpaces)
other_end = TokenizerPlugin(OtherEnd)
no_end = TokenizerPlugin(NoEnd)
with_bos = TokenizerPlugin(WithBOS)
other_types = TokenizerPlugin(OtherTypes)
raises = RaisesPlugin()

nudged = NudgedPlugin(Nudged)
opaque = NudgedPlugin(Opaque)
draws_itself = RunnerPlugin(DrawsItself)
described = RunnerPlugin(Described)
coarse = RunnerPlugin(lambda: Changed(coarse_logits))
swapped = RunnerPlugin(lambda: Changed(swapped_logits))
spaceless = RunnerPlugin(lambda: Changed(spaceless_logits))
shifted = RunnerPlugin(lambda: Changed(lambda logits: logits + np.float32(5)))
impossible = RunnerPlugin(lambda: Changed(lambda logits: logits - np.inf))
extreme = RunnerPlugin(lambda: Changed(lambda logits: logits * np.float32(1e6)))

last_of_ties = SamplerPlugin(LastOfTies)
fails = SamplerPlugin(Fails)
ignores_top_k = SamplerPlugin(lambda: Ignores(top_k=0))
ignores_temperature = SamplerPlugin(lambda: Ignores(temperature=0.0))
ignores_min_tokens = SamplerPlugin(lambda: Ignores(min_tokens=0))
