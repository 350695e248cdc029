"""All configurations against the first that can be loaded. One is loaded at a time; prints nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from ..components import build_tokenizer
from ..config import Loaded
from ..errors import ConfigError, NanoVLLMError
from ..request import SamplingParams
from .encode import Tokenized, bytes_of, encode
from .pair import Pair
from .perplexity import Increase, increase
from .prompts import Prompt
from .run import Run, run
from .stages import STAGES, Difference, of_prompts, of_vocabularies

TOLERANCE = 1e-3  # of logits: float32 in another order of summation differs by less, int8 by far more

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One configuration beside the reference."""

    name: str
    num_compared: int  # prompts
    differences: tuple[Difference, ...]  # at most one per prompt
    num_tokens: int = 0  # of the answers, equal in both
    largest: float | None = None  # difference of logits over all tokens; None: one of the two shows none
    unit: str = "logits"  # or log-probabilities, where one of the two shows no more
    increase: Increase | None = None  # of the perplexity

    def stage(self, *, is_strict: bool) -> str | None:
        """The first at which any prompt differs; None: all is equal. Ties count only for the strict."""
        counted = (d.stage for d in self.differences if is_strict or not d.is_tie)
        return min(counted, key=STAGES.index, default=None)

    @property
    def num_ties(self) -> int:
        return sum(d.is_tie for d in self.differences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    prompts: tuple[Prompt, ...]
    reference: str
    verdicts: tuple[Verdict, ...]
    runs: Mapping[str, Run] = field(default_factory=dict)  # by name; empty where only tokenizers were compared
    tokenized: Mapping[str, Tokenized]  # by name
    failures: Mapping[str, NanoVLLMError]  # configurations that could not be loaded or asked

    def verdict(self, name: str) -> Verdict | None:
        """None: it is the reference."""
        return next((verdict for verdict in self.verdicts if verdict.name == name), None)

    def differs(self, *, is_strict: bool = False) -> bool:
        return any(verdict.stage(is_strict=is_strict) is not None for verdict in self.verdicts)


def compare_answers(
    configurations: Sequence[tuple[str, Loaded]],
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    tolerance: float = TOLERANCE,
    text: str | None = None,
    on_progress: Progress = lambda text: None,
) -> Comparison:
    """`params` needs a seed; `text`: to compare perplexities over.

    A configuration that cannot be loaded is left out. Raises its NanoVLLMError where that leaves fewer than two.
    """
    runs: dict[str, Run] = {}
    verdicts: list[Verdict] = []
    failures: dict[str, NanoVLLMError] = {}
    with ExitStack() as at_end:
        for name, loaded in configurations:
            on_progress(f"{name}: loading and asking")
            try:
                runs[name] = run(name, loaded, prompts, params, text)
            except NanoVLLMError as e:
                failures[name] = _named(name, e)
                continue
            finally:
                gc.collect()  # the next model needs the memory
            reference = next(iter(runs.values()))
            if runs[name] is reference:
                at_end.callback(reference.close)
            else:
                with closing(runs[name]):
                    verdicts.append(_verdict(reference, runs[name], prompts, params, tolerance))
    _check(runs, failures)
    return Comparison(
        prompts=tuple(prompts),
        reference=next(iter(runs)),
        verdicts=tuple(verdicts),
        runs=runs,
        tokenized={name: one.tokenized for name, one in runs.items()},
        failures=failures,
    )


def compare_tokenizers(configurations: Sequence[tuple[str, Loaded]], prompts: Sequence[Prompt]) -> Comparison:
    """Tokenizers alone, over all entries of their vocabularies; no model is loaded. Raises as `compare` does."""
    tokenized: dict[str, Tokenized] = {}
    failures: dict[str, NanoVLLMError] = {}
    for name, loaded in configurations:
        try:
            tokenizer = build_tokenizer(loaded)
            if tokenizer is None:
                raise ConfigError("its runner tokenizes by itself", hint="set tokenizer.type and tokenizer.path")
            eos_ids = tokenizer.eos_ids if loaded.config.eos is None else loaded.config.eos
            encoded = tuple(encode(tokenizer, prompt) for prompt in prompts)
            entries = bytes_of(tokenizer, encoded, [range(tokenizer.vocab_size)])
            tokenized[name] = Tokenized(name, tokenizer.vocab_size, eos_ids, encoded, entries)
        except NanoVLLMError as e:
            failures[name] = _named(name, e)
    _check(tokenized, failures)
    reference, *others = tokenized.values()
    verdicts = []
    for other in others:
        compared = _compared(prompts, reference, other)
        found = [of_prompts(i, prompts[i], reference, other) for i in compared]
        differences = (*of_vocabularies(reference, other), *(d for d in found if d is not None))
        verdicts.append(Verdict(name=other.name, num_compared=len(compared), differences=differences))
    return Comparison(
        prompts=tuple(prompts),
        reference=reference.name,
        verdicts=tuple(verdicts),
        tokenized=tokenized,
        failures=failures,
    )


def _verdict(
    reference: Run, other: Run, prompts: Sequence[Prompt], params: SamplingParams, tolerance: float
) -> Verdict:
    differences: list[Difference] = []
    gaps = []
    num_tokens = 0
    compared = _compared(prompts, reference.tokenized, other.tokenized)
    for i in compared:
        found = of_prompts(i, prompts[i], reference.tokenized, other.tokenized)
        if found is None:
            pair = Pair(i, (reference, other), params, tolerance)
            found = pair.difference()
            num_tokens += pair.num_equal
            gaps += [(gap.largest, gap.unit) for gap in pair.gaps()]
        if found is not None:
            differences.append(found)
    largest, unit = max(gaps, default=(None, "logits"))
    both = reference.perplexity, other.perplexity
    return Verdict(
        name=other.tokenized.name,
        num_compared=len(compared),
        differences=tuple(differences),
        num_tokens=num_tokens,
        largest=largest,
        unit=unit,
        increase=None if both[0] is None or both[1] is None else increase(both[0], both[1]),
    )


def _compared(prompts: Sequence[Prompt], a: Tokenized, b: Tokenized) -> list[int]:
    """The prompts but for the optional ones that neither configuration takes."""
    refused = [i for i, (x, y) in enumerate(zip(a.encoded, b.encoded, strict=True)) if x.refusal and y.refusal]
    return [i for i, prompt in enumerate(prompts) if not (prompt.is_optional and i in refused)]


def _named(name: str, e: NanoVLLMError) -> NanoVLLMError:
    """The same error, and whose it is."""
    named = NanoVLLMError(f"{name}: {e.message}", hint=e.hint)
    named.exit_code = e.exit_code
    return named


def _check(done: Mapping[str, object], failures: Mapping[str, NanoVLLMError]) -> None:
    """Raises the first failure if there is nothing to compare."""
    if len(done) < 2:
        raise next(iter(failures.values()))
