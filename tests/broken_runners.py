"""A tiny right runner, and runners that are wrong in one way each.

`TinyRunner` is one layer of attention over eight numbers per token, in NumPy, paged or in lanes; `truth` says what it
must compute. A fault is a subclass that changes a line of it. The plugin `broken` makes what `runner.fault` names.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from nanovllm.batch import Batch, Lanes, Packed, Paged, RunnerInfo, SeqOutput
from nanovllm.hookspecs import Context, hookimpl
from nanovllm.runner import LogitsRunner, ModelRunner
from nanovllm.sampler import NumpySampler

VOCAB = 125  # as many as tokenizer `simple`
POISON = VOCAB  # a token behind the vocabulary's end, which is never drawn: its key and value are NaN
MAX_LEN = 64
CHILDREN: list[subprocess.Popen[bytes]] = []  # that a broken runner left behind, for its test to end

_NUMBERS = 2 * np.sin(np.arange(1, 16 * VOCAB + 1) ** 2)  # as good as random; numpy.random is no cheap import
_EMBEDDINGS = np.vstack([_NUMBERS[: 8 * VOCAB].reshape(VOCAB, 8), np.full((1, 8), np.nan)])  # (VOCAB + 1, 8)
_HEAD = _NUMBERS[8 * VOCAB :].reshape(8, VOCAB) * 2


def embed(ids: Any, positions: Any) -> Any:
    """(T, 8): what is written into the KV cache."""
    return _EMBEDDINGS[ids] + np.sin(np.outer(positions, np.arange(1, 9)) / 3)


def attend(keys: Any) -> Any:
    """(n, 8), of which the last asks -> (VOCAB,)"""
    scores = keys @ keys[-1]
    weights = np.exp(scores - scores.max())
    return (weights @ keys / weights.sum() + keys[-1]) @ _HEAD


def truth(tokens: Sequence[int]) -> Any:
    """(len, VOCAB)"""
    keys = embed(np.array(tokens), np.arange(len(tokens)))
    return np.array([attend(keys[: n + 1]) for n in range(len(tokens))])


class TinyRunner(LogitsRunner):
    facts: dict[str, Any] = {}  # noqa: RUF012 (read only)

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        lanes = Lanes(ctx.max_num_seqs, MAX_LEN)
        paged = Paged(ctx.cache.block_size, ctx.cache.num_blocks or 128)
        kv = paged if ctx.options.layout == "paged" else lanes
        self.kv = np.zeros((paged.block_size * paged.num_blocks if kv is paged else ctx.max_num_seqs * MAX_LEN, 8))
        given = {
            "vocab_size": VOCAB, "max_model_len": MAX_LEN, "max_num_seqs": ctx.max_num_seqs, "kv": kv,
            "batch_invariant": True, "description": {"model": "tiny", "device": "cpu"},
        }  # fmt: skip
        self._info = RunnerInfo(**(given | self.facts))

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def slots(self, packed: Packed, s: int, positions: Any) -> Any:
        """Where the keys of these positions of sequence `s` are."""
        kv = self._info.kv
        if isinstance(kv, Paged):
            return packed.tables[s, positions // kv.block_size] * kv.block_size + positions % kv.block_size
        return packed.lanes[s] * MAX_LEN + positions

    def write(self, packed: Packed, s: int, positions: Any, keys: Any) -> None:
        self.kv[self.slots(packed, s, positions)] = keys

    def read(self, packed: Packed, s: int, num: int) -> Any:
        """The keys [0, num) of sequence `s`."""
        return self.kv[self.slots(packed, s, np.arange(num))]

    def forward(self, packed: Packed) -> Any:
        bounds = packed.q_start.tolist()
        with np.errstate(all="ignore"):
            for s, (first, end) in enumerate(pairwise(bounds)):
                positions = packed.positions[first:end]
                self.write(packed, s, positions, embed(packed.input_ids[first:end], positions))
            owners = np.searchsorted(packed.q_start, packed.rows, side="right") - 1
            rows = [
                attend(self.read(packed, s, packed.positions[row] + 1))
                for s, row in zip(owners.tolist(), packed.rows.tolist(), strict=True)
            ]
        return np.array(rows, np.float32).reshape(len(rows), VOCAB)


# ------------------------------------------------------------------------------------------------ wrong logits


class WrongSlot(TinyRunner):
    """Takes the blocks of a sequence for neighbours of its first one."""

    def slots(self, packed: Packed, s: int, positions: Any) -> Any:
        return packed.tables[s, 0] * self._info.kv.block_size + positions


class StaleBlock(TinyRunner):
    """Takes a slot that holds something for one that is cached."""

    def write(self, packed: Packed, s: int, positions: Any, keys: Any) -> None:
        empty = ~self.kv[self.slots(packed, s, positions)].any(axis=1)
        super().write(packed, s, positions[empty], keys[empty])


class MaskedByZero(TinyRunner):
    """Reads whole blocks, and multiplies what lies behind the sequence's end by 0."""

    def read(self, packed: Packed, s: int, num: int) -> Any:
        size = self._info.kv.block_size
        keys = super().read(packed, s, -(-num // size) * size)
        return keys[:num] + 0 * keys[num:].sum(axis=0)


class PositionOffByOne(TinyRunner):
    def write(self, packed: Packed, s: int, positions: Any, keys: Any) -> None:
        first, end = packed.q_start[s : s + 2]
        super().write(packed, s, positions, embed(packed.input_ids[first:end], positions + 1))


class FirstRows(TinyRunner):
    """As many rows as are wanted, and not those."""

    def forward(self, packed: Packed) -> Any:
        return super().forward(packed._replace(rows=np.arange(len(packed.rows), dtype=np.int32)))


class NeighboursCount(TinyRunner):
    def forward(self, packed: Packed) -> Any:
        logits = super().forward(packed)
        return logits - logits.mean(axis=0) / 10 if len(logits) > 1 else logits


class LanesAreOne(TinyRunner):
    """Every sequence has its keys in lane 0."""

    def slots(self, packed: Packed, s: int, positions: Any) -> Any:
        return positions


class ShortSighted(TinyRunner):
    """Sees no more than 48 positions."""

    def read(self, packed: Packed, s: int, num: int) -> Any:
        return super().read(packed, s, num)[-48:]


class LeakedSequence(TinyRunner):
    """A lane is as long as the longest text that it has held."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.longest: dict[int, int] = {}

    def read(self, packed: Packed, s: int, num: int) -> Any:
        lane = int(packed.lanes[s])
        self.longest[lane] = max(self.longest.get(lane, 0), num)
        keys = super().read(packed, s, self.longest[lane])
        return np.vstack([keys, keys[num - 1]]) if len(keys) > num else keys


# -------------------------------------------------------------------------------------- lies about what it can


class NotInvariant(TinyRunner):
    def forward(self, packed: Packed) -> Any:
        return super().forward(packed) + np.float32(1e-5) * len(packed.lanes)


class CannotChunk(TinyRunner):
    """The second chunk of a prompt knows nothing of the first."""

    def read(self, packed: Packed, s: int, num: int) -> Any:
        first, end = packed.q_start[s : s + 2]
        start = int(packed.positions[first]) if end - first > 1 else 0
        return super().read(packed, s, num)[start:]


class CannotResume(TinyRunner):
    """A sequence knows only what was computed on its own lane."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.starts: dict[int, int] = {}

    def write(self, packed: Packed, s: int, positions: Any, keys: Any) -> None:
        self.starts.setdefault(int(packed.lanes[s]), int(positions[0]))
        super().write(packed, s, positions, keys)

    def read(self, packed: Packed, s: int, num: int) -> Any:
        return super().read(packed, s, num)[self.starts[int(packed.lanes[s])] :]

    def release(self, seq_id: int, lane: int) -> None:
        self.starts.pop(lane, None)


class SaysLonger(TinyRunner):
    """Its tables end before the length that it declares."""

    facts = {"max_model_len": 2 * MAX_LEN}  # noqa: RUF012 (read only)

    def forward(self, packed: Packed) -> Any:
        if packed.positions.max() >= MAX_LEN:
            raise IndexError(f"index {MAX_LEN} is out of bounds")
        return super().forward(packed)


class SilentCpu(TinyRunner):
    """Whatever device is asked for."""


class SaysCuda(TinyRunner):
    """Names a device on which its logits are not."""

    facts = {"sampler": "broken", "description": {"device": "cuda:0"}}  # noqa: RUF012 (read only)


class WritesTheConfiguration(TinyRunner):
    def __init__(self, ctx: Context) -> None:
        ctx.options.more["found"].append("a fact")
        super().__init__(ctx)


class StrangeFacts(TinyRunner):
    facts = {"eos_ids": (VOCAB,)}  # noqa: RUF012 (read only)


class NamesAnotherEnd(TinyRunner):
    facts = {"eos_ids": (3,)}  # noqa: RUF012 (read only)


class IgnoresSizes(TinyRunner):
    facts = {"max_num_seqs": 64}  # noqa: RUF012 (read only)


# ---------------------------------------------------------------------------------------- logits of another kind


class Integers(TinyRunner):
    def forward(self, packed: Packed) -> Any:
        return (super().forward(packed) * 1000).astype(np.int32)


class TooWide(TinyRunner):
    def forward(self, packed: Packed) -> Any:
        return np.pad(super().forward(packed), ((0, 0), (0, 3)))


class AllRows(TinyRunner):
    def forward(self, packed: Packed) -> Any:
        return super().forward(packed._replace(rows=np.arange(len(packed.input_ids), dtype=np.int32)))


class Infinite(TinyRunner):
    def forward(self, packed: Packed) -> Any:
        logits = super().forward(packed)
        logits[packed.positions[packed.rows] == 1, 7] = -np.inf
        return logits


class FailsTheStep(TinyRunner):
    def forward(self, packed: Packed) -> Any:
        raise ValueError("not today")


# ------------------------------------------------------------------------------------------ tokens and requests


class IgnoresSeeds(TinyRunner):
    def execute(self, batch: Batch) -> list[SeqOutput]:
        self.sampler = _Unseeded(self.sampler)
        return super().execute(batch)


class _Unseeded:
    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def sample(self, logits: Any, rows: Any) -> Any:
        return self.sampler.sample(logits, [row._replace(uniform=float(np.random.random())) for row in rows])


class DrawsItself(ModelRunner):
    """Right, and draws tokens by itself."""

    def __init__(self, ctx: Context) -> None:
        self.inner = TinyRunner(ctx)
        self.inner.sampler = NumpySampler()

    @property
    def info(self) -> RunnerInfo:
        return self.inner.info

    def execute(self, batch: Batch) -> list[SeqOutput]:
        return self.inner.execute(batch)


class OwnDice(DrawsItself):
    """The seed does not matter."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.inner.sampler = _Unseeded(NumpySampler())


class OneCompletion(DrawsItself):
    """All completions of a request are one."""

    def execute(self, batch: Batch) -> list[SeqOutput]:
        seqs = tuple(s._replace(sampling=s.sampling._replace(completion_index=0)) for s in batch.seqs)
        return super().execute(Batch(seqs, batch.block_table, batch.block_size))


class NumpyTokens(DrawsItself):
    """They are no int, and no JSON."""

    def execute(self, batch: Batch) -> list[SeqOutput]:
        return [out._replace(tokens=tuple(map(np.int64, out.tokens))) for out in super().execute(batch)]


class SaysAllParameters(DrawsItself):
    """And leaves out top_k."""

    def execute(self, batch: Batch) -> list[SeqOutput]:
        seqs = tuple(
            s._replace(sampling=s.sampling._replace(params=replace(s.sampling.params, top_k=0))) for s in batch.seqs
        )
        return super().execute(Batch(seqs, batch.block_table, batch.block_size))


class OtherOrder(TinyRunner):
    """Of its outputs."""

    def execute(self, batch: Batch) -> list[SeqOutput]:
        outputs = zip((s.lane for s in batch.seqs), super().execute(batch), strict=True)
        return [out for _, out in sorted(outputs, key=itemgetter(0))]


class ExitsInAStep(TinyRunner):
    def forward(self, packed: Packed) -> Any:
        sys.exit(3)


class OwnSampler(TinyRunner):
    """Draws by itself what the engine's sampler should draw."""

    def execute(self, batch: Batch) -> list[SeqOutput]:
        if not all(s.sampling.is_greedy for s in batch.seqs):
            self.sampler = NumpySampler()
        return super().execute(batch)


class OneErrorForAll(TinyRunner):
    def execute(self, batch: Batch) -> list[SeqOutput]:
        outputs = super().execute(batch)
        error = next((out.error for out in outputs if out.error is not None), None)
        return outputs if error is None else [SeqOutput(error=error)] * len(outputs)


class FailsWithNan(TinyRunner):
    """One sequence's NaN fails the step."""

    def forward(self, packed: Packed) -> Any:
        logits = super().forward(packed)
        if len(logits) > 1 and np.isnan(logits).any() and not np.isnan(logits).all():
            raise ValueError("NaN")
        return logits


# ------------------------------------------------------------------------------------------------- bad manners


class Prints(TinyRunner):
    def forward(self, packed: Packed) -> Any:
        print(f"{len(packed.input_ids)} tokens")
        return super().forward(packed)


class PrintsAtLoad(TinyRunner):
    def __init__(self, ctx: Context) -> None:
        print("loading ...")
        super().__init__(ctx)


class Hangs(TinyRunner):
    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        time.sleep(1000)


class ClosesOnce(TinyRunner):
    def close(self) -> None:
        del self.kv


class LeaksAThread(TinyRunner):
    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        threading.Thread(target=threading.Event().wait, args=(30,), daemon=True).start()


class LeaksAProcess(TinyRunner):
    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        CHILDREN.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))


class LeaksSteps(TinyRunner):
    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.sizes: list[int] = []

    def forward(self, packed: Packed) -> Any:
        self.sizes.append(len(packed.rows))
        return super().forward(packed)


class ChangesTheProcess(TinyRunner):
    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        np.seterr(all="raise")


class LeaksRequests(TinyRunner):
    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.seen: dict[int, int] = {}
        self.num = 0

    def release(self, seq_id: int, lane: int) -> None:
        self.num += 1
        self.seen[self.num] = seq_id


RIGHT = (TinyRunner, DrawsItself)
FAULTS = {made.__name__: made for of in RIGHT for made in (of, *of.__subclasses__())}


# ---------------------------------------------------------------------------------------------------- the plugin


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    fault: str = "TinyRunner"
    layout: Literal["paged", "lanes"] = "paged"
    device: str = "auto"
    more: dict[str, Any] = {}


class Plugin:
    api_version = 1

    @hookimpl
    def runner_config(self) -> type[Options]:
        return Options

    @hookimpl
    def create_runner(self, ctx: Context) -> ModelRunner:
        return FAULTS[ctx.options.fault](ctx)


class SamplerPlugin:
    api_version = 1

    @hookimpl
    def create_sampler(self, ctx: Context) -> NumpySampler:
        return NumpySampler()


plugin = Plugin()
sampler = SamplerPlugin()
