"""RunnerConformance: the suite for runners. An author subclasses it with one fixture.

    class TestAcme(RunnerConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def config(cls):
            return {"model": "path/of/a/small/checkpoint", "runner": "acme"}

What is true of every plugin is tested by `Hygiene`, logits by `BorderTests`, answers by `EngineTests`; the tests
here are of what the runner says about itself. A test of a capability that the runner does not declare is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from ..batch import ALL_PARAMETERS, Lanes, Paged, Remote, RunnerInfo
from ..components import Components
from ..config import Loaded
from .hygiene import Hygiene
from .runner_border import BorderTests
from .runner_engine import EngineTests
from .runner_suite import FirstStep
from .suite import level

_HOST = (1, 3)  # kinds of DLPack devices that are this process' own memory: plain, and pinned for CUDA


class RunnerConformance(Hygiene, BorderTests, EngineTests):
    """Proves that a runner computes what its sequences are, alone and in any company; give it the fixture `config`.

    `atol`, `rounding`, `poison_tokens` and the fixture `reference` say more, where the defaults do not fit.
    """

    group = "runners"

    @level("basic")
    def test_its_facts_are_possible(self, parts: Components, info: RunnerInfo) -> None:
        assert info.vocab_size is not None or info.tokenizes, "info.vocab_size is None, and it does not tokenize"
        assert info.vocab_size is None or info.vocab_size >= 1, f"info.vocab_size is {info.vocab_size}"
        assert info.max_model_len >= 1, f"info.max_model_len is {info.max_model_len}"
        assert info.max_num_seqs >= 1, f"info.max_num_seqs is {info.max_num_seqs}"
        kv = info.kv
        assert isinstance(kv, (Paged, Lanes, Remote)), f"info.kv is {kv!r}, not a Paged, Lanes or Remote"
        assert all(size >= 1 for size in asdict(kv).values()), f"info.kv is {kv}"
        strange = ", ".join(sorted(info.supports - ALL_PARAMETERS))
        assert not strange, f"info.supports names what is no field of SamplingParams: {strange}"
        outside = [i for i in info.eos_ids if not 0 <= i < (info.vocab_size or 2**31)]
        assert not outside, f"info.eos_ids names tokens that do not exist: {outside}"
        try:
            json.dumps(dict(info.description))
        except (TypeError, ValueError) as e:
            pytest.fail(f"info.description is no JSON, as which people read it: {e}")
        assert parts.runner.info == info, "info has changed since the runner was made"

    @level("basic")
    def test_it_keeps_to_the_configured_sizes(self, loaded: Loaded, info: RunnerInfo) -> None:
        scheduler = loaded.config.scheduler
        assert info.max_num_seqs <= scheduler.max_num_seqs, (
            f"info.max_num_seqs is {info.max_num_seqs} where scheduler.max_num_seqs is {scheduler.max_num_seqs}"
        )
        asked = scheduler.max_model_len
        assert asked is None or info.max_model_len <= asked, (
            f"info.max_model_len is {info.max_model_len} where scheduler.max_model_len is {asked}"
        )

    @level("basic")
    def test_the_configuration_stays_as_it_was(
        self, parts: Components, as_given: object, config: Mapping[str, Any], loaded: Loaded
    ) -> None:
        assert (config, loaded.config.model_dump()) == as_given, "it wrote into the configuration; facts go into info"

    @level("basic")
    def test_it_runs_on_the_device_that_was_asked_for(
        self, loaded: Loaded, info: RunnerInfo, request: pytest.FixtureRequest
    ) -> None:
        """Asked for a GPU, it may refuse; it may not compute on the CPU without a word."""
        asked = str(loaded.config.runner.options.get("device", "auto"))
        self.skip_unless(asked not in ("auto", "cpu"), "the configuration asks for no device but the CPU")
        said = info.description.get("device")
        assert said is not None, f"runner.device is {asked!r}, and info.description does not say what became of it"
        assert not str(said).startswith("cpu"), f"runner.device is {asked!r}, and it runs on {said!r}"

    @level("basic")
    def test_logits_lie_on_the_device_that_it_names(self, info: RunnerInfo, first_step: FirstStep) -> None:
        """Where its sampler is numpy, logits are copied to the host, and only the description can tell."""
        self.skip_unless(hasattr(first_step.logits, "__dlpack_device__"), "its logits do not say where they lie")
        said = "cpu" if info.sampler == "numpy" else info.description.get("device")
        self.skip_unless(said is not None, "info.description names no device")
        kind, _ = first_step.logits.__dlpack_device__()
        is_host = int(kind) in _HOST
        where = "in host memory" if is_host else f"on a device of DLPack's kind {int(kind)}"
        assert is_host == str(said).startswith("cpu"), f"the logits lie {where}, and should lie on {said!r}"
