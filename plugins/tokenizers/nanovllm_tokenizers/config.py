"""The options of the `tokenizer:` section, besides `type` and `path`, which every tokenizer has."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ChatOptions(BaseModel):
    """Of `auto`, `hf` and `sentencepiece`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chat_template: str | None = Field(
        None,
        description="used instead of the model's chat template: llama3, falcon, granite, completion, or a jinja file",
    )


class TiktokenOptions(ChatOptions):
    encoding: str | None = Field(None, description="cl100k_base, o200k_base, p50k_base, r50k_base, llama3, ...")
    model_name: str | None = Field(None, description="a model whose encoding tiktoken knows, such as gpt2")
    pattern: str | None = Field(None, description="the regular expression that splits a text, for any other rank file")
    special_tokens: dict[Annotated[str, Field(min_length=1)], Annotated[int, Field(ge=0)]] = Field(
        {}, description="ids of special tokens, in addition to those of the encoding and of tokenizer_config.json"
    )

    @model_validator(mode="after")
    def _one_description(self) -> TiktokenOptions:
        given = [name for name in ("encoding", "model_name", "pattern") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other")
        return self
