"""Stepper: the sequences of all clients, each advanced by one token when its client asks.

They live in one engine, which batches whatever is asked for at a time; between two asks they rest in it. A sequence is
found by its client's name for it, or, in the seeds' words, by being exactly the given tokens. One that is not found is
no loss: its client sends it as a whole, and the prefix cache may still have most of it. Runs on one event loop. Knows
no HTTP and no JSON.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nanovllm.batch import TokenLogprob
from nanovllm.errors import NanoVLLMError, RequestError
from nanovllm.intake import Ticket
from nanovllm.request import Delta, Finish, PacedRequest, SamplingParams
from nanovllm_runner_http.wire import Answer, Ask, Plain, Step

from .errors import ApiError
from .keys import cache_salt
from .limits import Limits

if TYPE_CHECKING:
    from nanovllm.aio import AsyncLLM

NUM_AT_ONCE = 8192  # tokens to prepare on the event loop: about a millisecond

Name = tuple[str, str, int]  # owner (the API key), client, the client's number for the sequence
Look = tuple[str, float, bytes]  # owner, temperature, tokens: what the seeds' words know a sequence by


class Held:
    """One sequence, and what came of it: the inbox of its request. All but `num_open` belongs to the event loop."""

    def __init__(self, ticket: Ticket, token_ids: Sequence[int], on_news: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.num_open = 1
        self.ticket = ticket
        self.tokens = array("i", token_ids)  # prompt and generated
        self.num_given = len(token_ids)  # of these, how many its client brought
        self.logprobs: dict[int, TokenLogprob] = {}  # by position; of tokens that may be asked for again
        self.error: str | None = None
        self.finish: Finish | None = None
        self.used = 0.0  # when it was last asked for, by the stepper's clock
        self.num_waiting = 0  # calls that wait for it
        self._on_news = on_news

    @property
    def request_id(self) -> int:
        return self.ticket.request_id

    @property
    def num_prompt(self) -> int:
        return self.ticket.sequences[0].num_prompt

    def put(self, delta: Delta) -> None:
        if delta.logprobs is not None:
            self.logprobs.update(enumerate(delta.logprobs, len(self.tokens)))
        self.tokens.extend(delta.token_ids)
        self.finish = delta.finish
        if delta.finish in (Finish.ERROR, Finish.ABORT):
            self.error = delta.error or "the server aborted it"
        self._on_news()

    def fail(self, error: NanoVLLMError) -> None:
        self.error = error.message
        self._on_news()

    def is_at(self, at: int, token_ids: Sequence[int]) -> bool:
        """Can it be advanced from length `at`, or was it, with `token_ids` as the last tokens before that?"""
        if not self.num_given <= at <= len(self.tokens):
            return False
        return self.tokens[at - len(token_ids) : at] == array("i", token_ids)

    def has_answer(self, at: int) -> bool:
        return at < len(self.tokens) or self.error is not None or self.finish is not None

    def answer(self, at: int) -> Answer:
        """The token at this position, or why there is none; an empty answer while it is computed."""
        if at < len(self.tokens):
            first = self.ticket.sequences[0]
            scored = tuple(first.prompt_logprobs) if at == first.num_prompt and first.scores_prompt else None
            self.logprobs = {p: lp for p, lp in self.logprobs.items() if p >= at}
            return Answer(self.tokens[at], logprob=self.logprobs.get(at), prompt_logprobs=scored)
        if self.error is None and self.finish is not None:
            return Answer(error=f"it has ended here, after {at} tokens ({self.finish})")
        return Answer(error=self.error)


class Stepper:
    def __init__(self, llm: AsyncLLM, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.llm = llm
        self.limits = limits
        self._clock = clock  # seconds
        self._named: dict[Name, Held] = {}
        self._plain: dict[Look, list[Held]] = {}  # between two calls; equal ones stand for copies of one prompt
        self._num_claimed = 0  # sequences of the seeds' words that calls wait for
        self._waiters: list[asyncio.Future[None]] = []  # of calls, for the next thing that comes

    @property
    def num_held(self) -> int:
        return len(self._named) + sum(map(len, self._plain.values())) + self._num_claimed

    # ------------------------------------------------------------------------------- two ways to ask

    async def step(self, owner: str, step: Step) -> list[Answer]:
        """One answer per sequence, in order; an empty one where no token is there yet.

        It waits for the first tokens only, so that sequences in decode do not wait for another's long prompt.
        Raises ApiError (no room), EngineDead, EngineClosed. Nothing has changed when it is refused.
        """
        tickets = iter(await self._tickets([ask for ask in step.asks if ask.start is not None], owner))
        over = self._make_room(sum(ask.start is not None for ask in step.asks))
        over += [held for i in step.release if (held := self._named.pop((owner, step.client, i), None)) is not None]
        answers: list[Answer | None] = []  # what is known at once
        wanted: list[tuple[Held, int]] = []
        new: list[Held] = []
        for ask in step.asks:
            name = (owner, step.client, ask.seq_id)
            ticket = None if ask.start is None else next(tickets)
            held = self._named.get(name)
            if held is not None and not held.is_at(ask.at, ask.token_ids):
                over.append(self._named.pop(name))  # its client has another idea of it, and is right
                held = None
            answer: Answer | None = None
            if held is None and ticket is None:
                answer = Answer(is_unknown=True)
            elif held is None and isinstance(ticket, RequestError):
                answer = Answer(error=ticket.message)
            elif held is None:
                assert isinstance(ticket, Ticket), "neither none nor refused"
                held = self._named[name] = Held(ticket, ask.token_ids, self._on_news)
                new.append(held)
            if held is not None:
                wanted.append((held, ask.at))
            answers.append(answer)
        await self._advance(wanted, new, over, for_all=False)
        told = iter([held.answer(at) for held, at in wanted])
        return [answer or next(told) for answer in answers]

    async def step_plain(self, owner: str, plain: Sequence[Plain]) -> list[int]:
        """A token for each, or none at all: the seeds' words have no room for less.

        Raises RequestError, ApiError (no room, or a sequence has no next token), EngineDead, EngineClosed.
        """
        claimed = [self._claim(owner, p) for p in plain]  # ours alone until the answer
        self._num_claimed += len(plain)
        back = [(held, p.temperature) for held, p in zip(claimed, plain, strict=True) if held is not None]
        try:
            missing = [p for held, p in zip(claimed, plain, strict=True) if held is None]
            tickets = await self._tickets(missing, owner)
            if (refusal := next((t for t in tickets if isinstance(t, RequestError)), None)) is not None:
                raise refusal
            over = self._make_room(0)
            new = [
                Held(ticket, p.token_ids, self._on_news)
                for ticket, p in zip(tickets, missing, strict=True)
                if isinstance(ticket, Ticket)
            ]
            back += [(held, p.temperature) for held, p in zip(new, missing, strict=True)]
            begun = iter(new)
            wanted = [(held or next(begun), len(p.token_ids)) for held, p in zip(claimed, plain, strict=True)]
            await self._advance(wanted, new, over, for_all=True)
        finally:
            self._num_claimed -= len(plain)
            for held, temperature in back:
                if held.finish is None and held.error is None:
                    self._plain.setdefault((owner, temperature, held.tokens.tobytes()), []).append(held)
        if failed := next((held for held, at in wanted if held.answer(at).token is None), None):
            raise ApiError(500, str(failed.answer(len(failed.tokens)).error))
        return [held.tokens[at] for held, at in wanted]

    # ---------------------------------------------------------------------------------- what is held

    def free_idle(self) -> None:
        """Forget what nobody has asked for in a while. Raises EngineDead, EngineClosed."""
        before = self._clock() - self.limits.idle_seconds
        self._drop([held for held in self._resting() if held.used <= before])

    def _make_room(self, num_new: int) -> list[Held]:
        """Those unused for longest, as many as are too many; they are forgotten, and to be aborted. Raises ApiError."""
        too_many = self.num_held + num_new - self.limits.max_held
        if too_many <= 0:
            return []
        resting = self._resting()
        if too_many > len(resting):
            raise ApiError(503, f"the {self.limits.max_held} sequences that this server holds are all in use")
        return self._forget(sorted(resting, key=lambda held: held.used)[:too_many])

    def _resting(self) -> list[Held]:
        held = [*self._named.values(), *(h for copies in self._plain.values() for h in copies)]
        return [h for h in held if not h.num_waiting]

    def _forget(self, some: Sequence[Held]) -> list[Held]:
        gone = set(map(id, some))
        self._named = {name: held for name, held in self._named.items() if id(held) not in gone}
        kept = {look: [h for h in copies if id(h) not in gone] for look, copies in self._plain.items()}
        self._plain = {look: copies for look, copies in kept.items() if copies}
        return list(some)

    def _drop(self, some: Sequence[Held]) -> None:
        if some:
            self.llm.pace(over=[held.request_id for held in self._forget(some)])

    def _claim(self, owner: str, plain: Plain) -> Held | None:
        look = (owner, plain.temperature, array("i", plain.token_ids).tobytes())
        copies = self._plain.get(look)
        if copies is None:
            return None
        held = copies.pop()
        if not copies:
            del self._plain[look]
        return held

    async def _tickets(self, begin: Sequence[Ask | Plain], owner: str) -> list[Ticket | RequestError]:
        """Prepared, or refused; in another thread where that takes long."""

        def prepared() -> list[Ticket | RequestError]:
            return [self._ticket(one, owner) for one in begin]

        if sum(len(one.token_ids) for one in begin) <= NUM_AT_ONCE:
            return prepared()
        return await asyncio.to_thread(prepared)

    def _ticket(self, begin: Ask | Plain, owner: str) -> Ticket | RequestError:
        try:
            return self.llm.engine.prepare(_request(begin, owner) if isinstance(begin, Ask) else _plain(begin, owner))
        except RequestError as e:
            return e

    # ----------------------------------------------------------------------------------- advancing

    async def _advance(
        self, wanted: Sequence[tuple[Held, int]], new: Sequence[Held], over: Sequence[Held], *, for_all: bool
    ) -> None:
        """Have each computed to the token behind its length, and wait for the first ones, or for all."""
        grants = [(held.request_id, at + 1 - held.num_prompt) for held, at in wanted if not held.has_answer(at)]
        if new or grants or over:
            self.llm.pace([(held.ticket, held) for held in new], grants, [held.request_id for held in over])
        for held, _ in wanted:
            held.num_waiting += 1
        is_late = False

        def late() -> None:
            nonlocal is_late
            is_late = not for_all
            self._on_news()

        timer = asyncio.get_running_loop().call_later(self.limits.max_wait, late)
        num_enough = len(wanted) if for_all else min(1, len(wanted))
        try:
            while sum(held.has_answer(at) for held, at in wanted) < num_enough and not is_late:
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
                await waiter
        finally:
            timer.cancel()
            now = self._clock()
            for held, _ in wanted:
                held.num_waiting -= 1
                held.used = now

    def _on_news(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():  # its call was cancelled
                waiter.set_result(None)


def _request(ask: Ask, owner: str) -> PacedRequest:
    """Raises RequestError."""
    start = ask.start
    assert start is not None, "only a sequence that begins is a request"
    request = PacedRequest(
        prompt=ask.token_ids,
        params=start.sampling_params(),
        num_prompt=start.num_prompt,
        completion_index=start.completion_index,
        eos_ids=start.eos_ids,
        cache_salt=start.cache_salt,
    )
    return replace(request, cache_salt=cache_salt(owner, request.cache_salt))


def _plain(plain: Plain, owner: str) -> PacedRequest:
    """Raises RequestError."""
    return PacedRequest(
        prompt=plain.token_ids,
        params=SamplingParams(temperature=plain.temperature, max_tokens=None, ignore_eos=True),
        num_prompt=len(plain.token_ids),
        cache_salt=cache_salt(owner, None),
    )
