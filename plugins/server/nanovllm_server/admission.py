"""Admission: may this call begin now? If it could not be answered in time it is refused at once. Knows no route.

How long a newcomer waits is its place in the queue times the seconds from one answer's end to the next while all of
the engine's slots are taken, which is measured as calls end.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import ApiError
from .notes import note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nanovllm.intake import Ticket

    from .options import ServerOptions
    from .ratelimit import RateLimits

_WEIGHT = 0.1  # of the newest interval in the mean


class Admission:
    """All on one event loop."""

    def __init__(self, options: ServerOptions, rates: RateLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self.rates = rates
        self.num_slots = 1  # answers that the engine runs at once; `State.load` sets it
        self.is_draining = False
        self.num_calls = 0
        self.num_streams = 0
        self.num_answers = 0  # running and waiting
        self._answers_of: Counter[str] = Counter()  # by owner; as many as there are keys
        self._clock = clock
        self._interval: float | None = None  # seconds between two ends while all slots are taken
        self._last_end = 0.0  # the last end, or when the last slot was taken

    @contextmanager
    def enter(self, owner: str, tickets: Sequence[Ticket], is_stream: bool) -> Iterator[None]:
        """Entered once per call, on the event loop, with its tokenized and checked requests, before the engine has
        them; left when the call is over, however it ends.

        `owner`: the key's short name ("" without keys). Raises ApiError: 503 with retry_after, 429 where only this
        key has too many, 400 for more than would ever fit.
        """
        num_answers = sum(len(ticket.sequences) for ticket in tickets)
        self.check(owner, num_answers, is_stream)
        self.num_calls += 1
        self.num_streams += is_stream
        self.num_answers += num_answers
        self._answers_of[owner] += num_answers
        if self.num_answers - num_answers < self.num_slots <= self.num_answers:
            self._last_end = self._clock()
        try:
            yield
        finally:
            self._measure(num_answers)
            self.num_calls -= 1
            self.num_streams -= is_stream
            self.num_answers -= num_answers
            self._answers_of[owner] -= num_answers
            num_prompt = sum(ticket.sequences[0].num_prompt for ticket in tickets)
            num_output = sum(seq.num_output for ticket in tickets for seq in ticket.sequences)
            self.rates.charge(owner, num_prompt + num_output)
            note(
                stream=is_stream, answers=num_answers, prompt_tokens=num_prompt, completion_tokens=num_output,
                **({"prompts": [str(ticket.request.prompt) for ticket in tickets]} if self.options.log_prompts else {}),
            )  # fmt: skip

    def check(self, owner: str, num_answers: int, is_stream: bool) -> None:
        """Raises as `enter` does. Costs nothing, so that a flood can be refused before its prompts are tokenized."""
        options = self.options
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        most_of_key = self.rates.limit(owner, "answers_at_once") or math.inf
        most = min(self.num_slots + options.max_queue, most_of_key)
        if num_answers > most:
            raise ApiError(400, f"one call may ask this server for {most:.0f} answers, not {num_answers}")
        if self._answers_of[owner] + num_answers > most_of_key:
            problem = f"{self._answers_of[owner]} answers of this API key run or wait; at most {most_of_key:.0f} may"
            raise ApiError(429, problem, code="rate_limit_exceeded", retry_after=1)
        wait = self.expected_wait()
        if is_stream and self.num_streams >= options.max_streams:
            problem = f"{options.max_streams} streams are open, which is all that this server serves at once"
        elif self.num_answers + num_answers > self.num_slots + options.max_queue:
            problem = f"the queue is full: {self.num_answers} answers run or wait"
        elif wait > options.max_queue_seconds:
            problem = f"the queue is too long: it would take about {wait:.0f} s"
        else:
            return
        raise ApiError(503, f"{problem}; try again later", code="overloaded", retry_after=wait)

    def expected_wait(self) -> float:
        """Seconds that a newcomer would wait for a slot."""
        place = self.num_answers - self.num_slots + 1
        return 0.0 if place <= 0 or self._interval is None else place * self._interval

    def _measure(self, num_ended: int) -> None:
        if self.num_answers < self.num_slots:
            return  # a slot was free: how far apart ends are says nothing
        now = self._clock()
        interval = (now - self._last_end) / num_ended
        self._last_end = now
        self._interval = interval if self._interval is None else self._interval + _WEIGHT * (interval - self._interval)
