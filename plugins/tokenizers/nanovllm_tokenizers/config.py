"""The options of `tokenizer: {type: hf, ...}`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class HFOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(None, description="tokenizer.json or its directory, if not in the model's directory")
    chat_template: str | None = Field(None, description="a jinja file to use instead of the model's chat template")
