"""Tokenizers and chat templates for nanovllm: the entry point `hf`.

Importing this package is light: the tokenizers library and jinja2 are imported when a tokenizer is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.errors import TokenizerError
from nanovllm.hookspecs import hookimpl

if TYPE_CHECKING:
    from pydantic import BaseModel

    from nanovllm.hookspecs import Context

    from .hf import HFTokenizer


class HFPlugin:
    """`tokenizer: hf`, a tokenizer.json file or the directory that holds one."""

    api_version = 1

    @hookimpl
    def tokenizer_config(self) -> type[BaseModel]:
        from .config import HFOptions

        return HFOptions

    @hookimpl
    def create_tokenizer(self, ctx: Context) -> HFTokenizer:
        from pathlib import Path

        from .hf import load

        options = ctx.options
        path = Path(options.path) if options.path else ctx.tokenizer_path or ctx.path
        if path is None:
            raise TokenizerError(
                f"the model {ctx.model!r} is not a directory, so there is no tokenizer.json to load",
                hint="set tokenizer.path to a tokenizer.json or to its directory",
            )
        if path.is_file() and path.suffix != ".json":  # MODEL_PATH may be the model.onnx itself
            path = path.parent
        return load(path, Path(options.chat_template) if options.chat_template else None)


plugin = HFPlugin()
