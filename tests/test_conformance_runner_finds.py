"""The runner suite finds what is wrong: each broken runner fails the test that is there for it, a right one none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broken_runners import CHILDREN, FAULTS, POISON, truth
from conformance_support import MADE, failures, outcomes
from nanovllm.components import Components, build
from nanovllm.config import load
from nanovllm.testing import RunnerConformance
from nanovllm.testing.hygiene import Hygiene
from nanovllm.testing.runner_suite import Reference
from site_of_fakes import Install, fake_site

# Fault -> what fails: the test that is there to find it, and the few others that see it too.
FINDS = {
    "MaskedByZero": ["test_what_is_not_a_number_reaches_no_later_owner"],
    "PositionOffByOne": ["test_logits_are_the_references", "test_greedy_tokens_are_the_references"],
    "NotInvariant": ["test_batch_invariant_logits_are_equal_to_the_bit"],
    "CannotChunk": [
        "test_chunks_of_any_size_give_the_same",
        "test_random_programs",
        "test_a_prefix_that_another_sequence_computed",  # what follows it is like a second chunk
        "test_cached_prefixes_are_answered_as_alone",
        "test_preempted_requests_are_answered_as_alone",
    ],
    "CannotResume": [
        "test_a_prefix_that_another_sequence_computed",
        "test_cached_prefixes_are_answered_as_alone",
        "test_preempted_requests_are_answered_as_alone",
    ],
    "SaysCuda": ["test_logits_lie_on_the_device_that_it_names"],
    "WritesTheConfiguration": ["test_the_configuration_stays_as_it_was"],
    "ShortSighted": ["test_logits_are_the_references"],
    "SaysLonger": [
        "test_a_text_as_long_as_it_allows",
        "test_logits_are_the_references",
        "test_a_prefix_that_another_sequence_computed",
    ],
    "NamesAnotherEnd": ["test_end_tokens_are_the_references"],
    "StrangeFacts": ["test_its_facts_are_possible", "test_end_tokens_are_the_references"],
    "IgnoresSizes": ["test_it_keeps_to_the_configured_sizes"],
    "Integers": ["test_logits_are_floats"],
    "TooWide": ["test_logits_have_the_right_shape"],
    "AllRows": ["test_logits_have_the_right_shape"],
    "Infinite": ["test_logits_are_finite", "test_logits_are_the_references"],
    "FailsTheStep": ["test_a_step_ends_well"],
    "IgnoresSeeds": ["test_seeds_decide_the_answers"],
    "OwnDice": ["test_seeds_decide_the_answers"],
    "OneCompletion": ["test_seeds_decide_the_answers"],
    "NumpyTokens": ["test_tokens_are_ids"],
    "SaysAllParameters": ["test_it_honours_the_parameters_that_it_declares"],
    "OtherOrder": [
        "test_requests_in_a_crowd_are_answered_as_alone",
        "test_aborting_a_request_changes_no_other",
        "test_cached_prefixes_are_answered_as_alone",
    ],
    "ExitsInAStep": ["test_a_step_ends_well"],
    "OwnSampler": ["test_seeds_decide_the_answers"],
    "OneErrorForAll": ["test_an_error_of_one_request_changes_no_other"],
    "FailsWithNan": ["test_a_poisoned_neighbour_changes_nothing"],
    "Prints": ["test_a_step_leaves_stdout_alone"],
    "PrintsAtLoad": ["test_it_leaves_stdout_alone"],
    "ClosesOnce": ["test_closing_twice"],
    "LeaksAThread": ["test_closing_twice"],
    "LeaksAProcess": ["test_closing_twice"],
    "LeaksSteps": ["test_hundreds_of_requests_leave_nothing_behind"],
    "ChangesTheProcess": ["test_it_leaves_the_process_as_it_was"],
    "LeaksRequests": ["test_hundreds_of_requests_leave_nothing_behind"],
}
# Fault -> how it keeps KV, and the test that is there to find it: so wrong that most others see it too.
FINDS_EVERYWHERE = {
    "WrongSlot": ("paged", "test_any_order_of_blocks_gives_the_same"),
    "StaleBlock": ("paged", "test_what_former_owners_left_reaches_nobody"),
    "FirstRows": ("paged", "test_rows_of_a_prompt_are_those_of_its_beginnings"),
    "NeighboursCount": ("paged", "test_a_crowd_changes_nothing"),
    "LanesAreOne": ("lanes", "test_a_crowd_changes_nothing"),
    "LeakedSequence": ("lanes", "test_a_lane_that_was_given_up_starts_fresh"),
}


SEEN_BY_THE_CHILD = {"PrintsAtLoad", "ChangesTheProcess"}  # which is left out where it would see nothing
NOT_FOR_ALL = {"test_it_runs_on_the_device_that_was_asked_for", "test_it_honours_the_parameters_that_it_declares"}
NEED_BLOCKS = {
    "test_a_prefix_that_another_sequence_computed",
    "test_any_order_of_blocks_gives_the_same",
    "test_cached_prefixes_are_answered_as_alone",
    "test_preempted_requests_are_answered_as_alone",
}


class Tiny(RunnerConformance):
    poison_tokens = (POISON,)

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls) -> Reference:
        return truth

    @pytest.fixture(scope="class")
    @classmethod
    def numpy_parts(cls) -> Components:
        """What the NumPy runner is to others."""
        return build(load(overrides=config()))


@pytest.fixture(autouse=True)
def _own_error_state() -> Iterator[None]:
    """ChangesTheProcess changes this one too."""
    with np.errstate():
        yield


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Install]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanovllm.testing.leaks._PATIENCE", 0.5)  # the whole of it is waited for where something leaks
        yield from fake_site(tmp_path_factory.mktemp("broken") / "site", patch)


@pytest.fixture(scope="module", autouse=True)
def _broken(install: Install) -> Iterator[None]:
    lines = {
        "nanovllm.runners": "broken = broken_runners:plugin",
        "nanovllm.samplers": "broken = broken_runners:sampler",
    }
    install("broken", lines)
    yield
    for child in CHILDREN:
        child.communicate()  # the end of its input is its own end


def config(fault: str = "TinyRunner", **options: Any) -> dict[str, Any]:
    runner = {"type": "broken", "fault": fault, "more": {"found": []}, **options}
    return {"model": "tiny", "runner": runner, "tokenizer": "simple"}


@pytest.mark.parametrize("layout", ["paged", "lanes"])
def test_a_right_runner_passes_everything_that_it_declares(layout: str) -> None:
    came = outcomes(Tiny, config(layout=layout))
    assert "failed" not in came.values(), [name for name, outcome in came.items() if outcome == "failed"]
    skipped = {name for name, outcome in came.items() if outcome == "skipped"}
    assert skipped == NOT_FOR_ALL | (NEED_BLOCKS if layout == "lanes" else set())


def test_a_right_runner_that_draws_tokens_itself_passes() -> None:
    came = outcomes(Tiny, config("DrawsItself"))
    assert "failed" not in came.values(), [name for name, outcome in came.items() if outcome == "failed"]
    assert came["test_it_honours_the_parameters_that_it_declares"] == "passed"


@pytest.mark.parametrize("fault", FINDS)
def test_a_fault_fails_the_test_that_is_there_for_it(fault: str) -> None:
    seen = None if fault in SEEN_BY_THE_CHILD else MADE
    assert sorted(failures(Tiny, config(fault), seen)) == sorted(FINDS[fault])


@pytest.mark.parametrize("fault", FINDS_EVERYWHERE)
def test_a_fault_that_spoils_everything_also_fails_the_test_that_is_there_for_it(fault: str) -> None:
    layout, named = FINDS_EVERYWHERE[fault]
    found = failures(Tiny, config(fault, layout=layout), MADE)
    assert named in found
    assert not found.keys() & {"test_it_is_made", "test_a_step_ends_well", "test_logits_have_the_right_shape"}


def test_a_constructor_that_hangs_is_one_failure() -> None:
    class Impatient(Tiny):
        startup_seconds = 2

    came = outcomes(Impatient, config("Hangs"))
    assert [name for name, outcome in came.items() if outcome == "failed"] == ["test_it_is_made"]
    assert sum(outcome == "skipped" for outcome in came.values()) == len(came) - 3


def test_a_device_that_is_not_used_is_told() -> None:
    assert list(failures(Tiny, config("SilentCpu", device="cuda"))) == ["test_it_runs_on_the_device_that_was_asked_for"]


def test_a_runtime_that_is_imported_too_early_is_told(install: Install, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = "import torch\nfrom broken_runners import Plugin\nplugin = Plugin()\n"
    install("heavy", {"nanovllm.runners": "heavy = heavy_runner:plugin"}, heavy_runner=source)

    class Imported(Hygiene):
        group = "runners"

    found = failures(Imported, {**config(), "runner": "heavy"})
    assert list(found) == ["test_importing_it_loads_no_runtime"]
    assert "torch" in found["test_importing_it_loads_no_runtime"]


def test_every_fault_is_tried() -> None:
    assert {*FINDS, *FINDS_EVERYWHERE, "Hangs", "SilentCpu", "TinyRunner", "DrawsItself"} == set(FAULTS)
