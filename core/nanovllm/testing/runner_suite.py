"""What the runner suite's tests stand on: the runner made once per class, its first step, texts, and the truth.

The truth about logits is what the runner itself computes for a sequence alone, from scratch, in one step; whether
that is right is `reference`'s matter. This file has no tests.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from ..batch import Lanes, Packed, Paged, Remote, RunnerInfo
from ..components import Components, build
from ..config import Loaded, load
from ..errors import NanoVLLMError
from ..plugins import discover, resolve_model
from ..request import Prompt, SamplingParams
from ..runner import LogitsRunner, is_floating
from .driver import Doubles, Driver
from .runner_alone import Alone
from .suite import Conformance

Reference = Callable[[Sequence[int]], Doubles]  # token ids -> (len, vocab) logits

MAX_LONG = 300  # tokens

# What a configuration says nothing about: small enough for lanes and blocks to change hands often.
_SIZES = (
    "scheduler.max_num_seqs=8",
    "scheduler.max_num_batched_tokens=512",
    "cache.block_size=4",
    "cache.num_blocks=128",
)


@dataclass(frozen=True, slots=True)
class FirstStep:
    """What came of a step of one sequence that wants one row."""

    logits: Any  # as the runner returned them; None if it did not get so far
    error: str | None  # what it raised
    vocab_size: int | None

    @property
    def is_shaped(self) -> bool:
        return tuple(getattr(self.logits, "shape", ())) == (1, self.vocab_size)

    @property
    def is_float(self) -> bool:
        return is_floating(getattr(self.logits, "dtype", None))


class RunnerSuite(Conformance):
    atol: ClassVar[float] = 1e-4
    """How far logits may be from the reference's. A quantised runner says its own."""

    rounding: ClassVar[float] = 1e-4
    """How far logits may be from those of the same sequence alone. A runner of short floats says its own."""

    poison_tokens: ClassVar[tuple[int, ...]] = ()
    """Tokens whose logits, and what they leave in the KV cache, are NaN or infinite: a broken weight, on purpose."""

    # ------------------------------------------------------------------------------- the runner and its parts

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, config: Mapping[str, Any]) -> Loaded:
        return load(overrides=config, sets=_SIZES, environ={})

    @pytest.fixture(scope="class")
    @classmethod
    def as_given(cls, config: Mapping[str, Any], loaded: Loaded) -> object:
        """The configuration before the runner was made."""
        return copy.deepcopy((config, loaded.config.model_dump()))

    @pytest.fixture(scope="class")
    @classmethod
    def makeable(cls) -> None:
        """Asked before the runner is made in this process, which it may hang."""

    @pytest.fixture(scope="class")
    @classmethod
    def parts(cls, loaded: Loaded, makeable: None, as_given: object) -> Iterator[Components]:
        """What the configuration leads to; all tests of the class share it."""
        parts = build(loaded)
        yield parts
        with contextlib.suppress(Exception):  # test_closing_twice is about it
            parts.runner.close()

    @pytest.fixture(scope="class")
    @classmethod
    def info(cls, parts: Components) -> RunnerInfo:
        return parts.runner.info

    @pytest.fixture(scope="class")
    @classmethod
    def first_step(cls, parts: Components) -> FirstStep:
        runner = parts.runner
        if not isinstance(runner, LogitsRunner) or isinstance(runner.info.kv, Remote):
            pytest.skip("it draws tokens by itself and returns no logits")
        seen: list[Any] = []
        driver, error = Driver(runner), None
        forward = runner.forward

        def spy(packed: Packed) -> Any:
            seen.append(forward(packed))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "forward", spy)
            try:
                driver.step((driver.begin((1, 0, 1)), 3, 1))
            except (Exception, SystemExit) as e:
                error = f"{type(e).__name__}: {e}"
            driver.end_all()
        return FirstStep(seen[0] if seen else driver.recorder.logits, error, runner.info.vocab_size)

    @pytest.fixture(scope="class")
    @classmethod
    def sound(cls, parts: Components, first_step: FirstStep) -> LogitsRunner:
        """The runner, for what reads its logits; where there are none to read, the tests of the first step fail."""
        if first_step.error is not None or not first_step.is_shaped or not first_step.is_float:
            pytest.skip("its first step gave no logits to compare")
        assert isinstance(parts.runner, LogitsRunner)
        return parts.runner

    @pytest.fixture(scope="class")
    @classmethod
    def working(cls, parts: Components, request: pytest.FixtureRequest) -> Components:
        """The parts, for what goes through an engine; which a runner without sound logits would only fail."""
        if isinstance(parts.runner, LogitsRunner) and not isinstance(parts.runner.info.kv, Remote):
            request.getfixturevalue("sound")
        return parts

    # -------------------------------------------------------------------------------------------- the truth

    @pytest.fixture(scope="class")
    @classmethod
    def numpy_parts(cls, loaded: Loaded, info: RunnerInfo) -> Iterator[Components]:
        """The NumPy runner on the same model; skips what needs it where there is none."""
        name, path = resolve_model(loaded.config.model)
        if path is None or not path.is_dir():
            pytest.skip(f"there is no reference: model {name!r} is no directory, and the suite has no `reference`")
        if not any(found.name == "numpy" for found in discover("runners")):
            pytest.skip("there is no reference: try: pip install 'nanovllm[numpy]'")
        section = loaded.config.tokenizer
        tokenizer = {"type": section.type, "path": section.path, **section.options}
        runner = {"type": "numpy", "threads": loaded.config.runner.threads}
        given = {"model": loaded.config.model, "runner": runner, "tokenizer": tokenizer}
        try:
            parts = build(load(overrides=given, sets=_SIZES, environ={}))
        except NanoVLLMError as e:
            pytest.skip(f"there is no reference: {e.message}")
        yield parts
        parts.runner.close()

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, numpy_parts: Components, info: RunnerInfo) -> Reference | None:
        """Token ids -> the right logits (len, vocab), or None. Override it where the NumPy runner cannot tell."""
        runner = numpy_parts.runner
        assert isinstance(runner, LogitsRunner)
        if runner.info.vocab_size != info.vocab_size:
            pytest.skip(f"there is no reference: the model in these files has {runner.info.vocab_size} tokens")
        driver = Driver(runner)

        def logits(tokens: Sequence[int]) -> Doubles:
            text = driver.begin(tokens)
            [rows] = driver.step((text, len(tokens), len(tokens)))
            driver.end(text)
            return rows

        return logits

    @pytest.fixture(scope="class")
    @classmethod
    def alone(cls, parts: Components) -> Alone:
        return Alone(parts)

    def check(self, driver: Driver, alone: Alone, rounding: float | None = None) -> None:
        """All that the driver computed is what each sequence gives alone. Ends the driver's sequences."""
        driver.end_all()
        alone.check(driver.rows, self.rounding if rounding is None else rounding)

    # -------------------------------------------------------------------------------------------- the texts

    @pytest.fixture(scope="class")
    @classmethod
    def texts(cls, info: RunnerInfo, loaded: Loaded) -> list[tuple[int, ...]]:
        """Of lengths around those at which blocks end."""
        if info.vocab_size is None:
            pytest.skip("the runner knows no token ids")
        kv, budget = info.kv, loaded.config.scheduler.max_num_batched_tokens
        num = min(info.max_num_seqs, 8)  # of them at once
        size = kv.block_size if isinstance(kv, Paged) else 4
        room = kv.num_blocks // num * size if isinstance(kv, Paged) else kv.max_len if isinstance(kv, Lanes) else 40
        longest = min(max(40, 2 * size + 3), room, info.max_model_len, budget // 4)
        lengths = [longest, 1, size, longest - 1, size + 1, 2, longest // 2, size - 1]
        allowed = np.setdiff1d(np.arange(info.vocab_size), cls.poison_tokens)
        rng = np.random.default_rng(0)
        return [tuple(rng.choice(allowed, min(max(1, n), longest)).tolist()) for n in lengths]

    @pytest.fixture(scope="class")
    @classmethod
    def long_text(cls, info: RunnerInfo, loaded: Loaded, texts: list[tuple[int, ...]]) -> tuple[int, ...]:
        """As long as one may be and a step can take, up to MAX_LONG: tables and number types end somewhere."""
        kv, budget = info.kv, loaded.config.scheduler.max_num_batched_tokens
        room = kv.num_blocks * kv.block_size if isinstance(kv, Paged) else kv.max_len if isinstance(kv, Lanes) else 40
        longest = min(MAX_LONG, room, info.max_model_len, budget)
        return tuple(itertools.islice(itertools.cycle(itertools.chain(*texts)), longest))

    @pytest.fixture(scope="class")
    @classmethod
    def prompts(cls, info: RunnerInfo, request: pytest.FixtureRequest) -> list[Prompt]:
        """For tests through an engine; text where the runner knows no token ids."""
        if info.vocab_size is None:
            return ["hello world", "a", "what can you do", "the end", "once upon a time there was", "hello"]
        return [text[: max(1, len(text) // 2)] for text in request.getfixturevalue("texts")]

    def params(self, info: RunnerInfo, **wanted: Any) -> SamplingParams:
        """Greedy and of one length, unless `wanted` says otherwise; skips where the runner lacks something of it."""
        asked = {"temperature": 0.0, "max_tokens": 8, **wanted}
        if "ignore_eos" in info.supports:
            asked["ignore_eos"] = True
        lacks = sorted(asked.keys() - info.supports - {"max_tokens"})
        self.skip_unless(not lacks, f"the runner does not support {', '.join(lacks)}")
        return SamplingParams(**asked)
