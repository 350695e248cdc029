"""Tokenizers and chat templates for nanovllm: the entry points `auto`, `hf`, `sentencepiece` and `tiktoken`.

Importing this package is light: the libraries and jinja2 are imported when a tokenizer is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.errors import TokenizerError
from nanovllm.hookspecs import hookimpl
from nanovllm.plugins import model_directory

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel

    from nanovllm.hookspecs import Context

    from .base import BaseTokenizer
    from .hf import HFTokenizer
    from .sentencepiece import SentencePieceTokenizer
    from .tiktoken import TiktokenTokenizer


class HFPlugin:
    """`tokenizer: hf`, a tokenizer.json, or vocab.json with merges.txt, or the directory that holds them."""

    api_version = 1

    @hookimpl
    def tokenizer_config(self) -> type[BaseModel]:
        from .config import ChatOptions

        return ChatOptions

    @hookimpl
    def create_tokenizer(self, ctx: Context) -> HFTokenizer:
        from .hf import load

        return load(_files(ctx), ctx.options.chat_template)


class SentencePiecePlugin:
    """`tokenizer: sentencepiece`, a SentencePiece .model or the directory that holds one."""

    api_version = 1

    @hookimpl
    def tokenizer_config(self) -> type[BaseModel]:
        from .config import ChatOptions

        return ChatOptions

    @hookimpl
    def create_tokenizer(self, ctx: Context) -> SentencePieceTokenizer:
        from .sentencepiece import load

        return load(_files(ctx), ctx.options.chat_template)


class TiktokenPlugin:
    """`tokenizer: tiktoken`, a rank file, the directory that holds one, or the name of an encoding."""

    api_version = 1

    @hookimpl
    def tokenizer_config(self) -> type[BaseModel]:
        from .config import TiktokenOptions

        return TiktokenOptions

    @hookimpl
    def create_tokenizer(self, ctx: Context) -> TiktokenTokenizer:
        from .tiktoken import load

        is_named = ctx.options.encoding is not None or ctx.options.model_name is not None
        has_files = ctx.tokenizer_path is not None or ctx.path is not None
        return load(_files(ctx) if has_files or not is_named else None, ctx.options)


class AutoPlugin:
    """`tokenizer: auto`, the one of the others that reads the files there are."""

    api_version = 1

    @hookimpl
    def tokenizer_config(self) -> type[BaseModel]:
        from .config import ChatOptions

        return ChatOptions

    @hookimpl
    def create_tokenizer(self, ctx: Context) -> BaseTokenizer:
        from .auto import kind_of
        from .config import TiktokenOptions

        path, template = _files(ctx), ctx.options.chat_template
        match kind_of(path):
            case "hf":
                from .hf import load

                return load(path, template)
            case "sentencepiece":
                from .sentencepiece import load

                return load(path, template)
            case "tiktoken":
                from .tiktoken import load

                return load(path, TiktokenOptions(chat_template=template))


def _files(ctx: Context) -> Path:
    """Where the tokenizer's files are. Raises TokenizerError if the model is only a name."""
    if ctx.tokenizer_path is not None:
        return ctx.tokenizer_path
    if ctx.path is None:
        raise TokenizerError(
            f"the model {ctx.model!r} is not a directory, so there is no tokenizer to load",
            hint="set tokenizer.path to a tokenizer's file or directory",
        )
    return model_directory(ctx.path)  # MODEL_PATH may be the model.onnx itself


plugin = HFPlugin()
sentencepiece_plugin = SentencePiecePlugin()
tiktoken_plugin = TiktokenPlugin()
auto_plugin = AutoPlugin()
