"""What a dialect is: how one kind of server is asked, and how its answers are read.

A dialect is stateless and safe to use from several threads; what one stream must remember lives in the
`read` of its Exchange. It knows no socket (it is given a Transport to probe with), no engine and no retry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from nanovllm.batch import Sampling, ScheduledSeq, TokenLogprob
from nanovllm.request import Finish

from ..errors import one_line

if TYPE_CHECKING:
    from nanovllm.tokenizer import Tokenizer

    from ..sse import Event
    from ..transport import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a probe found out about a server and its model; None where the server does not say."""

    dialect: str  # its name in the configuration
    model: str | None = None  # the name to send
    vocab_size: int | None = None
    max_model_len: int | None = None  # prompt + generated
    num_slots: int | None = None  # answers that it computes at a time
    eos_ids: tuple[int, ...] = ()
    takes_ids: bool = True  # can a prompt be token ids?
    takes_text: bool = True  # can a prompt be text or messages, so that no local tokenizer is needed?
    kind: str | None = None  # which kind of server, where a dialect tells several apart
    lacks: frozenset[str] = frozenset()  # parameters of the dialect that this server does not know
    description: Mapping[str, Any] = field(default_factory=dict)  # for people

    def vocabulary(self, tokenizer: Tokenizer | None) -> int | None:
        """Entries; the tokenizer's where the server does not say."""
        return self.vocab_size if self.vocab_size or tokenizer is None else tokenizer.vocab_size

    def described(self, mode: str) -> dict[str, Any]:
        """For RunnerInfo."""
        model = None if self.model is None else one_line(self.model)
        return {"dialect": self.dialect, "mode": mode, "model": model, **self.description}

    def length(self, wanted: int | None, unknown: int) -> int:
        """Of a sequence; `unknown` where neither the server nor the configuration says."""
        return min((n for n in (self.max_model_len, wanted) if n is not None), default=unknown)


class Piece(NamedTuple):
    """What one event of a stream brought. `finish` or `error` makes it the last one that is looked at."""

    tokens: tuple[int, ...] = ()
    text: str | None = None  # None: the engine makes the text from the tokens
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token
    finish: Finish | None = None  # STOP or LENGTH
    error: str | None = None  # the server's own, in one sentence


class Exchange(NamedTuple):
    """One sequence as an HTTP call: what to POST, and how to read the events that come back."""

    path: str  # below the server's address: "/completion"
    body: Mapping[str, Any]  # sent as JSON; asks for a stream
    # Returns None for an event without news. Raises UpstreamError for what this dialect does not allow: JSON that
    # is none, missing fields, another sequence's answer. One reader per attempt, so it may keep state.
    read: Callable[[Event], Piece | None]


class Dialect(Protocol):
    name: str  # as in the configuration
    supports: frozenset[str]  # names of SamplingParams that it can express
    extra_fields: frozenset[str]  # names that `extra:` may hold

    def probe(self, transport: Transport) -> Facts | None:
        """Ask a server for its facts; None if it does not speak this dialect.

        Raises UpstreamError where it cannot be asked (down, still loading, refuses the key).
        """
        ...

    def exchange(self, seq: ScheduledSeq, facts: Facts, extra: Mapping[str, Any]) -> Exchange:
        """The call for one sequence. Raises NanoVLLMError for a prompt that cannot be said in this dialect."""
        ...


def upstream_seed(sampling: Sampling, num_seeds: int) -> int:
    """The seed of one completion: the request's plus the completion's index, in [0, num_seeds)."""
    return (sampling.seed + sampling.completion_index) % num_seeds
