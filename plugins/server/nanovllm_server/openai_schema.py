"""The bodies of OpenAI's calls, to the letter: unknown fields are refused, unsupported ones with the reason.

pydantic checks types and ranges here, and the OpenAPI document is made of these models; what depends on the model
(lengths, ids, templates) the engine checks. Every list and object has a most, and the first wrong item ends the check:
pydantic would else collect a complaint for each of a body's million items, on the event loop. Knows no route and no
engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WrapValidator,
    model_validator,
)

from nanovllm.request import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PRIORITY,
    MAX_SALT_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_TOKENS,
    SamplingParams,
    show,
)

from .errors import ApiError

MAX_FIELDS = 128  # of one object
MAX_IDS = 1 << 20  # in one list
MAX_PROMPTS = 1 << 12
MAX_MESSAGES = 1 << 12
MAX_PARTS = 1 << 10  # of one message

# ------------------------------------------------------------------------------- what is not supported

_TOOLS = "this server calls no tools"
_TEXT_ONLY = "text is all that goes in and comes out"
# Field -> (why not, values that ask for nothing and are therefore fine, as null always is).
_UNSUPPORTED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "tools": (_TOOLS, ([],)),
    "tool_choice": (_TOOLS, ("none",)),
    "tool_calls": (_TOOLS, ([],)),
    "parallel_tool_calls": (_TOOLS, ()),
    "functions": (_TOOLS, ([],)),
    "function_call": (_TOOLS, ("none",)),
    "response_format": ("the answer cannot be held to a grammar", ({"type": "text"},)),
    "guided_json": ("the answer cannot be held to a grammar", ()),
    "guided_regex": ("the answer cannot be held to a grammar", ()),
    "guided_choice": ("the answer cannot be held to a grammar", ()),
    "guided_grammar": ("the answer cannot be held to a grammar", ()),
    "structured_outputs": ("the answer cannot be held to a grammar", ()),
    "best_of": ("ask for n completions and choose", ()),
    "suffix": ("text is only continued, not filled in", ("",)),
    "use_beam_search": ("tokens are sampled", (False,)),
    "audio": (_TEXT_ONLY, ()),
    "modalities": (_TEXT_ONLY, (["text"],)),
    "refusal": ("an answer cannot be marked as a refusal", ()),
    "annotations": ("a message has a role and a content", ([],)),
    "name": ("no chat template has a place for it", ()),
    "prediction": ("the answer is computed, not compared", ()),
    "reasoning_effort": ("the model thinks as it was trained to", ()),
    "verbosity": ("say it in the prompt", ()),
    "web_search_options": ("this server fetches nothing", ()),
    "service_tier": ("there is one tier", ("auto", "default")),
    "store": ("nothing is stored", (False,)),
    "chat_template": ("a request brings no template", ()),
    "chat_template_kwargs": ("a request brings no template", ({},)),
    "continue_final_message": ("a conversation ends with the answer's beginning", (False,)),
    "add_generation_prompt": ("a conversation ends with the answer's beginning", (True,)),
    "prompt_embeds": ("a prompt is text or token ids", ()),
    "allowed_token_ids": ("use logit_bias", ()),
    "bad_words": ("use logit_bias", ([],)),
    "length_penalty": ("it belongs to beam search", (1, 1.0)),
}
# Labels of the caller's own: taken, and without effect on the answer.
Label: TypeAlias = Annotated[str, StringConstraints(max_length=512)]


def _drop_neutral(data: Any) -> Any:
    """Null is OpenAI's word for `not given`, and clients send defaults of what they do not use."""
    if not isinstance(data, dict):
        return data
    _few(MAX_FIELDS)(data)
    return {k: v for k, v in data.items() if v is not None and not (k in _UNSUPPORTED and v in _UNSUPPORTED[k][1])}


def _few(most: int) -> Callable[[Any], Any]:
    """No more entries than that, before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"it has {len(value)} entries; at most {most} are taken")
        return value

    return check


def _else(sentence: str) -> WrapValidator:
    """One sentence in place of one complaint for each member of a union."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise ValueError(sentence) from None

    return WrapValidator(check)


def _take_null(schema: dict[str, Any]) -> None:
    """In the document, too, null stands for every field that may be left out."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **about}


class Body(BaseModel):
    """A call's body, or an object in it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, json_schema_extra=_take_null
    )

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        return _drop_neutral(data)


# ------------------------------------------------------------------------------------ what is

Id: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
Ids: TypeAlias = Annotated[list[Id], Field(max_length=MAX_IDS, fail_fast=True)]
Stop: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


class StreamOptions(Body):
    include_usage: bool = Field(default=False, description="a last event with the usage and no choices")
    include_obfuscation: Literal[False] = Field(default=False, description="events are not padded")


class Sampling(Body):
    """What completions and chat share; the defaults are OpenAI's."""

    model: Annotated[str, StringConstraints(max_length=512)] | None = Field(
        default=None, description="a name of /v1/models; null = the one model of this server"
    )
    n: int = Field(default=1, ge=1, le=MAX_N, description="answers to each prompt")
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 = always the most likely token")
    top_p: float = Field(default=1.0, gt=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="the same seed, the same answer")
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)],
        _else(f"must be a text or a list of at most {MAX_STOPS} texts, each of 1 to {MAX_STOP_CHARS} characters"),
    ] = Field(default=[], description="texts that end the answer and are not part of it")
    logit_bias: Annotated[
        dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
        BeforeValidator(_few(MAX_LOGIT_BIAS)),
    ] = Field(
        default={},
        max_length=MAX_LOGIT_BIAS,
        description="token id -> what is added to its logit",
        json_schema_extra={"additionalProperties": False},
    )
    user: Label | None = Field(default=None, description="a label of yours; without effect, as the next three")
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: Annotated[dict[Label, Label], BeforeValidator(_few(16))] = Field(default={}, max_length=16)

    # Extensions, under the names that other servers use.
    top_k: int = Field(default=0, ge=-1, lt=2**31, description="only the k most likely tokens; 0 or -1 = all")
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    min_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    stop_token_ids: list[Id] = Field(default=[], max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)
    ignore_eos: bool = False
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_SALT_CHARS)] | None = Field(
        default=None, description="cached prefixes are shared only among requests with the same salt (and key)"
    )
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="lower runs first")

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, max_tokens: int | None, *, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """Raises RequestError."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()} or None,
            seed=None if self.seed is None else self.seed % 2**64,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: Annotated[
        str
        | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(max_length=MAX_PROMPTS, fail_fast=True)],
        _else(
            "must be a text, a list of texts, a list of token ids or a list of such lists; "
            f"at most {MAX_PROMPTS} prompts, each of at most {MAX_IDS} ids"
        ),
    ]
    max_tokens: int = Field(default=16, ge=0, le=MAX_TOKENS, description="0 only with echo: nothing but the prompt")
    echo: bool = Field(default=False, description="the prompt in front of the answer")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    @property
    def is_prompt_only(self) -> bool:
        return self.max_tokens == 0

    @model_validator(mode="after")
    def _shows_something(self) -> CompletionRequest:
        if self.is_prompt_only and not self.echo:
            raise ValueError("max_tokens: 0 gives nothing without echo")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer: the same as system")
    content: Annotated[
        str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)],
        _else(f"must be a text or a list of at most {MAX_PARTS} {{type: text}} parts; " + _TEXT_ONLY),
    ]

    def plain(self) -> dict[str, str]:
        """As templates take it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


Messages: TypeAlias = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: Messages
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS, description="the older name of the next")
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="of the answer; null = to the end of the model's length"
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="needs logprobs")

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


class TokenizeRequest(Body):
    """POST /v1/tokenize: a text, or a conversation as the model's template writes it."""

    text: str | None = None
    messages: Messages | None = None
    parse_special: bool = Field(default=False, description="may the text spell special tokens?")

    @model_validator(mode="after")
    def _is_one_of_both(self) -> TokenizeRequest:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either text or messages")
        return self


class DetokenizeRequest(Body):
    """POST /v1/detokenize"""

    token_ids: Ids


SomeBody = TypeVar("SomeBody", bound=BaseModel)


def checked(model: type[SomeBody], data: Mapping[str, Any]) -> SomeBody:
    """Raises ApiError (400) for the first thing wrong, with its place."""
    try:
        return model.model_validate(data)
    except ValidationError as e:
        error = e.errors(include_url=False, include_context=False)[0]
    place, last = _place(error["loc"]), str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        shown, reason = show(last), _UNSUPPORTED.get(last)
        if inside := _place(error["loc"][:-1]):
            shown = f"{inside}: {shown}"
        message = f"{shown} is no field of this call" if reason is None else f"{shown} is not supported: {reason[0]}"
        raise ApiError(400, message, param=last if reason else None, code="unsupported_parameter" if reason else None)
    if error["type"] == "missing":
        raise ApiError(400, f"{place} is missing", param=place)
    what = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    raise ApiError(400, f"{place}: {what}" if place else what, param=place or None)


def _place(loc: tuple[int | str, ...]) -> str:
    """('messages', 0, 'content') -> messages[0].content"""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
