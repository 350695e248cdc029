"""The two base classes of a runner.

`ModelRunner` is the whole border: one verb, `execute`. `LogitsRunner` is for runtimes that return
logits: it implements `execute` with `forward` and a sampler. Neither knows a scheduler, a request
or a plugin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from . import rng
from .batch import Batch, Packed, RunnerInfo, Sampled, SampleRow, SeqOutput
from .errors import RunnerError

if TYPE_CHECKING:
    from .batch import TokenLogprob


class Sampler(Protocol):
    """Draws tokens from logits. A runner that samples natively names its kind in `RunnerInfo.sampler`."""

    def sample(self, logits: Any, rows: Sequence[SampleRow]) -> Sampled:
        """Draw one token per row.

        `logits`: (R, vocab) float, in the runner's own array type; `rows`: R of them. The sampler must
        not change the logits' owner's data. Errors of a row go into `Sampled.errors`, never raise.
        """
        ...


class ModelRunner(ABC):
    """Executes batches. One engine owns it and calls it from one thread at a time (`wake` excepted)."""

    @property
    @abstractmethod
    def info(self) -> RunnerInfo:
        """The facts of the loaded model; constant for the runner's life."""

    @abstractmethod
    def execute(self, batch: Batch) -> list[SeqOutput]:
        """Run one step; exactly one SeqOutput per ScheduledSeq, in order.

        Raises RunnerError if the step failed (its sequences fail, the engine goes on) and RunnerDead
        if no later step can succeed. Any other exception counts as RunnerError.
        """

    def release(self, seq_id: int, lane: int) -> None:  # noqa: B027 (nothing to do by default)
        """The sequence left its lane (finished, aborted, failed or preempted): drop its state."""

    def wake(self) -> None:  # noqa: B027 (nothing to do by default)
        """Make a blocked `execute` return at once. Thread-safe."""

    def close(self) -> None:  # noqa: B027 (nothing to do by default)
        """Free everything. No other call follows, but this one may come again."""


class LogitsRunner(ModelRunner):
    """A runner that computes logits; sampling is the core's or the runner's native sampler's."""

    sampler: Sampler | None = None  # set once by the engine, before the first step

    @abstractmethod
    def forward(self, packed: Packed) -> Any:
        """Compute KV for all tokens and return logits (R, vocab) for `packed.rows`, on the runner's device."""

    def execute(self, batch: Batch) -> list[SeqOutput]:
        logits = self.forward(batch.packed)
        rows = _sample_rows(batch)
        _check(logits, len(rows), self.info.vocab_size)
        if not rows:
            return [SeqOutput()] * len(batch.seqs)
        assert self.sampler is not None, "the engine sets the sampler before the first step"
        return _outputs(batch, rows, self.sampler.sample(logits, rows))


def _check(logits: Any, num_rows: int, vocab_size: int | None) -> None:
    """Raises RunnerError for what is not so many rows of logits, by facts of the array that no device is asked for."""
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", None)
    if shape is None or dtype is None:
        raise RunnerError(f"the runner returned a {type(logits).__name__}, not an array of logits")
    if len(shape) != 2 or shape[0] != num_rows or vocab_size not in (None, shape[1]):
        raise RunnerError(
            f"the runner returned logits of shape {tuple(shape)} where {num_rows} rows of {vocab_size} were asked for"
        )
    if not is_floating(dtype):
        raise RunnerError(f"the runner returned logits of type {dtype}, which is not a floating-point type")


def is_floating(dtype: Any) -> bool:
    """Of any library's arrays: by numpy's kind, or by the name, which they all have in common."""
    return getattr(dtype, "kind", None) == "f" or "float" in str(dtype)


def _sample_rows(batch: Batch) -> list[SampleRow]:
    """One row per wanted logit: the last of a sequence samples, those before score prompt tokens."""
    drawing = [s for s in batch.seqs if s.samples and not s.sampling.is_greedy]
    uniforms = iter(
        rng.uniforms(
            [s.sampling.seed for s in drawing],
            [s.sampling.completion_index for s in drawing],
            [len(s.context) for s in drawing],
        )
        if drawing
        else ()
    )
    rows: list[SampleRow] = []
    for s in batch.seqs:
        wanted = s.num_logits
        if not wanted:
            continue
        sampling, context, num_prompt, samples = s.sampling, s.context, s.num_prompt, s.samples
        if wanted > 1 or not samples:
            # Row of position p scores the token at p + 1.
            last = s.stop - 1 if samples else s.stop
            rows += [
                SampleRow(sampling, context, num_prompt, 0.0, int(context[p + 1])) for p in range(s.stop - wanted, last)
            ]
        if samples:
            rows.append(
                SampleRow(sampling, context, num_prompt, 0.0 if sampling.is_greedy else float(next(uniforms)), None)
            )
    return rows


def _outputs(batch: Batch, rows: list[SampleRow], sampled: Sampled) -> list[SeqOutput]:
    """Split the sampler's flat answer by sequence."""
    ids, logprobs, errors = sampled.ids, sampled.logprobs, sampled.errors
    if len(ids) != len(rows):
        raise RunnerError(f"the sampler returned {len(ids)} ids for {len(rows)} rows")
    if logprobs is None and not errors and len(rows) == len(batch.seqs):  # plain decode: one row each
        return [SeqOutput((int(i),)) for i in ids]
    out: list[SeqOutput] = []
    row = 0
    for s in batch.seqs:
        end = row + s.num_logits
        error = next((errors[r] for r in range(row, end) if r in errors), None) if errors else None
        tokens: tuple[int, ...] = ()
        own: tuple[TokenLogprob, ...] | None = None
        scored: tuple[TokenLogprob, ...] | None = None
        if error is None and end > row:
            last = end - 1 if s.samples else end
            if s.samples:
                tokens = (int(ids[last]),)
                if logprobs is not None and (lp := logprobs[last]) is not None:
                    own = (lp,)
            if last > row:
                assert logprobs is not None, "a scoring row always has a logprob"
                scored = tuple(lp for lp in logprobs[row:last] if lp is not None)
        out.append(SeqOutput(tokens, None, error, own, scored))
        row = end
    return out
