"""What OpenAI's calls answer, for the OpenAPI document; the answers are put together by hand, for speed.

Tests hold every answer against these models and against the official client's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class Answered(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PromptTokensDetails(Answered):
    cached_tokens: int


class UsageAnswer(Answered):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Answered):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answered):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionAnswered(Answered):
    """A whole answer, or with `stream` one event of many: then `finish_reason` is null but in the last of a choice."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageAnswer | None = None


class TopLogprob(Answered):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobAnswer(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answered):
    content: list[TokenLogprobAnswer]
    refusal: None


class AssistantMessage(Answered):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answered):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswered(Answered):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class ChatDelta(Answered):
    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(Answered):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Answered):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None


class ModelAnswer(Answered):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelsAnswer(Answered):
    object: Literal["list"]
    data: list[ModelAnswer]


class TokenizeAnswer(Answered):
    token_ids: list[int]


class DetokenizeAnswer(Answered):
    text: str
