"""UpstreamError: the one error of everything that goes wrong between us and a server. Knows no socket."""

from __future__ import annotations

from typing import Any

from nanovllm.errors import RunnerError


class UpstreamError(RunnerError):
    """`str(e)` is one sentence that names the server. It ends one request, never the engine.

    `can_retry`: the same call may go out again, here or elsewhere, if no token of it has been shown.
    """

    def __init__(
        self,
        message: str,
        *,
        can_retry: bool = False,
        status: int | None = None,  # of the HTTP answer, if one came
        retry_after: float | None = None,  # seconds, where the server said so
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.can_retry = can_retry
        self.status = status
        self.retry_after = retry_after

    def at(self, url: str) -> UpstreamError:
        """The same, of a server that the sentence (`it sent ...`) does not name yet."""
        return UpstreamError(
            f"{url}: {self.message}",
            can_retry=self.can_retry,
            status=self.status,
            retry_after=self.retry_after,
            hint=self.hint,
        )


def one_line(value: Any, limit: int = 200) -> str:
    """A server's words as part of a sentence of ours: one line, printable, bounded."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)[: 4 * limit]).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
