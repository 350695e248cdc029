"""The runner suite's tests of logits: batches made by hand, and every row held against its sequence alone.

All of them need a runner that returns logits. Knows no engine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise, permutations

import numpy as np
import pytest

from ..batch import Paged, RunnerInfo
from ..runner import LogitsRunner
from ..scheduler import MIN_ROWS
from .driver import Driver, Text
from .runner_alone import Alone
from .runner_suite import FirstStep, Reference, RunnerSuite
from .suite import level

Texts = list[tuple[int, ...]]
NUM_DECODED = 4  # tokens at the end of a text that come one by one
NUM_PIECE = 60  # tokens at once of a long text
NUM_ROWS = MIN_ROWS // 8  # of each text, where all may want some


class BorderTests(RunnerSuite):
    @pytest.fixture
    def driver(self, sound: LogitsRunner) -> Iterator[Driver]:
        driver = Driver(sound)
        yield driver
        driver.end_all()

    # -------------------------------------------------------------------------------------- basic: right logits

    @level("basic")
    def test_a_step_ends_well(self, first_step: FirstStep) -> None:
        is_told = first_step.logits is not None and not (first_step.is_shaped and first_step.is_float)
        self.skip_unless(not is_told, "other tests say what is wrong with its logits")
        assert first_step.error is None, f"the first step failed: {first_step.error}"

    @level("basic")
    def test_logits_have_the_right_shape(self, first_step: FirstStep) -> None:
        self.skip_unless(first_step.logits is not None, "its first step gave no logits")
        shape, wanted = getattr(first_step.logits, "shape", None), (1, first_step.vocab_size)
        assert first_step.is_shaped, f"logits are of shape {shape} where (rows, vocab_size) are {wanted}"

    @level("basic")
    def test_logits_are_floats(self, first_step: FirstStep) -> None:
        self.skip_unless(first_step.logits is not None, "its first step gave no logits")
        assert first_step.is_float, f"logits are numbers of type {getattr(first_step.logits, 'dtype', None)}"

    @level("basic")
    def test_logits_are_finite(self, driver: Driver, texts: Texts) -> None:
        for text in texts:
            advance(driver, driver.begin(text))
            driver.end_all()
        bad = sum(1 for row in driver.rows if not np.isfinite(row.logits).all())
        assert not bad, f"{bad} of {len(driver.rows)} rows of logits have numbers that are NaN or infinite"

    @level("basic")
    def test_logits_are_the_references(
        self, driver: Driver, texts: Texts, long_text: tuple[int, ...], reference: Reference | None
    ) -> None:
        if reference is None:
            pytest.skip("the suite has no reference")
        for text in (*texts, long_text):
            wanted = reference(text)
            del driver.rows[:]
            advance(driver, driver.begin(text))
            driver.end_all()
            for tokens, logits in driver.rows:
                worst = np.abs(logits - wanted[len(tokens) - 1]).max()
                assert worst <= self.atol, (
                    f"the logits behind {len(tokens)} tokens are {worst:.3g} away from the reference's, "
                    f"where {self.atol:g} is allowed"
                )

    @level("basic")
    def test_rows_of_a_prompt_are_those_of_its_beginnings(
        self, driver: Driver, alone: Alone, texts: Texts, info: RunnerInfo
    ) -> None:
        self.skip_unless("prompt_logprobs" in info.supports, "the runner does not support prompt_logprobs")
        for text in texts:
            driver.step((driver.begin(text), len(text), min(len(text), MIN_ROWS)))
            driver.end_all()
        driver.step(*((driver.begin(t), len(t), min(len(t), NUM_ROWS)) for t in texts[: driver.num_lanes]))
        self.check(driver, alone)

    @level("basic")
    def test_a_step_without_rows_fills_the_cache(
        self, driver: Driver, alone: Alone, texts: Texts, info: RunnerInfo
    ) -> None:
        self.skip_unless(info.can_chunk, "the runner declares that it cannot chunk")
        live = [driver.begin(text) for text in texts[: driver.num_lanes] if len(text) > 1]
        for text, rows in zip(live, driver.step(*((t, t.left - 1, 0) for t in live)), strict=True):
            assert len(rows) == 0, f"{len(rows)} rows of logits came for lane {text.lane}, which wanted none"
        driver.step(*((t, 1, 1) for t in live))
        self.check(driver, alone)

    # ---------------------------------------------------------------------------- batched: alone == in a crowd

    @level("batched")
    def test_a_crowd_changes_nothing(self, driver: Driver, alone: Alone, texts: Texts) -> None:
        advance(driver, *(driver.begin(text) for text in texts[: driver.num_lanes]))
        self.check(driver, alone)

    @level("batched")
    def test_other_lanes_in_another_order_change_nothing(self, driver: Driver, alone: Alone, texts: Texts) -> None:
        lanes = reversed(range(driver.num_lanes))
        live = [driver.begin(text, lane) for text, lane in zip(texts, lanes, strict=False)]
        advance(driver, *live, rng=random.Random(1))
        self.check(driver, alone)

    @level("batched")
    def test_sequences_that_join_and_leave_change_nothing(self, driver: Driver, alone: Alone, texts: Texts) -> None:
        """One joins in every step, with its prompt beside the others' single tokens."""
        live: list[Text] = []
        waiting = [*texts, *reversed(texts)]
        while waiting or live:
            work = [(t, 1, 1) for t in live]
            if waiting and len(live) < driver.num_lanes:
                text = driver.begin(waiting.pop())
                work.append((text, max(1, text.left - NUM_DECODED), 1))
                live.append(text)
            driver.step(*work)
            for text in [t for t in live if not t.left]:
                driver.end(text)
                live.remove(text)
        self.check(driver, alone)

    # ------------------------------------------------------------------------------- paged: blocks and lanes

    @level("paged")
    def test_any_order_of_blocks_gives_the_same(
        self, sound: LogitsRunner, alone: Alone, texts: Texts, info: RunnerInfo
    ) -> None:
        self.skip_unless(isinstance(info.kv, Paged), "the runner's KV cache is not paged")
        for seed in range(3):
            driver = Driver(sound, shuffle=seed)
            advance(driver, *(driver.begin(text) for text in texts[: driver.num_lanes]))
            self.check(driver, alone)

    @level("paged")
    def test_what_former_owners_left_reaches_nobody(
        self, sound: LogitsRunner, alone: Alone, texts: Texts, info: RunnerInfo
    ) -> None:
        """Long after short and short after long, in the same few blocks and the same lane."""
        few = -(-max(map(len, texts)) // info.kv.block_size) if isinstance(info.kv, Paged) else None
        driver = Driver(sound, shuffle=0, num_blocks=few)
        for pair in permutations(texts, 2):
            for text in pair:
                advance(driver, driver.begin(text))
                driver.end_all()
        self.check(driver, alone)

    @level("paged")
    def test_what_is_not_a_number_reaches_no_later_owner(self, sound: LogitsRunner, alone: Alone, texts: Texts) -> None:
        self.skip_unless(self.poison_tokens, "no token of the model makes NaN (poison_tokens)")
        driver = Driver(sound)
        for poison in self.poison_tokens:
            spoilt = [driver.begin((poison,) * len(text)) for text in texts[: driver.num_lanes]]
            driver.step(*((t, t.left, 1) for t in spoilt))
            assert not any(np.isfinite(row.logits).all() for row in driver.rows), "poison_tokens poison nothing"
            del driver.rows[:]
            driver.end_all()
            advance(driver, *(driver.begin(text) for text in texts[: driver.num_lanes]))
            try:
                self.check(driver, alone)
            finally:  # over all that is spoilt: the next test is about something else
                driver.step(*((driver.begin(text), len(text), 1) for text in texts[: driver.num_lanes]))
                driver.end_all()

    @level("paged")
    def test_chunks_of_any_size_give_the_same(
        self, sound: LogitsRunner, alone: Alone, texts: Texts, info: RunnerInfo
    ) -> None:
        self.skip_unless(info.can_chunk, "the runner declares that it cannot chunk")
        size = info.kv.block_size if isinstance(info.kv, Paged) else 4
        scores = "prompt_logprobs" in info.supports
        for chunk in sorted({1, 2, 3, size - 1, size, size + 1, 2 * size + 1} - {0}):
            driver = Driver(sound, shuffle=chunk)
            live = [driver.begin(text) for text in texts[: driver.num_lanes]]
            while any(t.left for t in live):
                work = [(t, min(chunk, t.left)) for t in live if t.left]
                driver.step(*((t, n, min(n, NUM_ROWS) if scores else int(n == t.left)) for t, n in work))
            self.check(driver, alone)

    @level("paged")
    def test_a_text_as_long_as_it_allows(
        self, driver: Driver, alone: Alone, info: RunnerInfo, long_text: tuple[int, ...]
    ) -> None:
        text = driver.begin(long_text)
        if info.can_chunk:
            while text.left > NUM_PIECE:
                driver.step((text, NUM_PIECE, 0))
        advance(driver, text)
        self.check(driver, alone)

    @level("paged")
    def test_a_prefix_that_another_sequence_computed(
        self, sound: LogitsRunner, alone: Alone, texts: Texts, info: RunnerInfo
    ) -> None:
        """While that one lives, in one step with it, and after it has gone."""
        kv = info.kv
        self.skip_unless(isinstance(kv, Paged), "the runner's KV cache is not paged")
        self.skip_unless(info.can_resume_prefix, "the runner declares that it cannot resume a prefix")
        assert isinstance(kv, Paged)
        first = max(texts, key=len)
        self.skip_unless(len(first) > kv.block_size, "no text is longer than a block")
        self.skip_unless(info.max_num_seqs > 3, "the runner takes fewer than four sequences")
        for num_blocks in range(1, (len(first) - 1) // kv.block_size + 1):
            same = first[: num_blocks * kv.block_size]
            driver = Driver(sound, shuffle=num_blocks)
            owner = driver.begin(first)
            driver.step((owner, owner.left - 1, 1))
            guests = [driver.begin(same + other, on=owner) for other in texts[1:3]]
            driver.step((owner, 1, 1), *((guest, guest.left, 1) for guest in guests))
            late = driver.begin(same + texts[3], on=owner)
            for text in (owner, *guests):
                driver.end(text)
            advance(driver, late)
            self.check(driver, alone)

    @level("paged")
    def test_random_programs(self, sound: LogitsRunner, alone: Alone, texts: Texts, info: RunnerInfo) -> None:
        """Texts advance by random chunks in random company, and some give up half-way and start again."""
        scores = "prompt_logprobs" in info.supports
        for seed in range(8):
            rng, driver = random.Random(seed), Driver(sound, shuffle=seed)
            waiting, live = [*texts, *texts], list[Text]()
            while waiting or live:
                for lane in range(driver.num_lanes):
                    if waiting and rng.random() < 0.5 and all(t.lane != lane for t in live):
                        live.append(driver.begin(waiting.pop(), lane))
                work = []
                for text in rng.sample(live, len(live)):
                    num = min(text.left, rng.choice([text.left, 1, 1, 1, 1, 5, 0])) if info.can_chunk else text.left
                    if num:
                        is_end = num == text.left
                        most = min(num, NUM_ROWS) if scores else int(is_end)
                        work.append((text, num, rng.randint(int(is_end), most)))
                if work:
                    driver.step(*work)
                for text in [t for t in live if not t.left or rng.random() < 0.05]:
                    waiting += [text.tokens] * bool(text.left)
                    driver.end(text)
                    live.remove(text)
            self.check(driver, alone)

    # ---------------------------------------------------------------------------------------- robust, deterministic

    @level("robust")
    def test_a_poisoned_neighbour_changes_nothing(self, driver: Driver, alone: Alone, texts: Texts) -> None:
        self.skip_unless(self.poison_tokens, "no token of the model makes NaN (poison_tokens)")
        poisoned = driver.begin(self.poison_tokens * 2)
        advance(driver, poisoned, *(driver.begin(text) for text in texts[: min(3, driver.num_lanes - 1)]))
        driver.rows = [row for row in driver.rows if row.tokens[0] not in self.poison_tokens]
        try:
            self.check(driver, alone)
        finally:
            driver.step(*((driver.begin(text), len(text), 1) for text in texts[: driver.num_lanes]))

    @level("robust")
    def test_a_lane_that_was_given_up_starts_fresh(self, driver: Driver, alone: Alone, texts: Texts) -> None:
        """Each text leaves half-way; another one takes its lane, and the same one starts again on another."""
        for first, second in pairwise(text for text in texts if len(text) > 1):
            gone = driver.begin(first)
            driver.step((gone, gone.left // 2, 1))
            for text, lane in ((second, 0), (first, driver.num_lanes - 1)):
                driver.end_all()
                advance(driver, driver.begin(text, lane))
            driver.end_all()
        self.check(driver, alone)

    @level("deterministic")
    def test_batch_invariant_logits_are_equal_to_the_bit(
        self, sound: LogitsRunner, alone: Alone, texts: Texts, info: RunnerInfo
    ) -> None:
        self.skip_unless(info.batch_invariant, "the runner does not declare batch_invariant")
        for num in range(1, min(len(texts), info.max_num_seqs) + 1):
            driver = Driver(sound, shuffle=num)
            advance(driver, *(driver.begin(text) for text in texts[:num]))
            self.check(driver, alone, rounding=0)


def advance(driver: Driver, *texts: Text, rng: random.Random | None = None) -> None:
    """To their ends together: the prompts in one step, then tokens one by one, with a row of logits each."""
    driver.step(*((text, max(1, text.left - NUM_DECODED), 1) for text in texts))
    while going := [text for text in texts if text.left]:
        if rng is not None:
            rng.shuffle(going)
        driver.step(*((text, 1, 1) for text in going))
