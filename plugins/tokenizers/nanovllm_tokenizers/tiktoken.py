"""`TiktokenTokenizer`: a rank file, or an encoding known by name, through the tiktoken library.

The library encodes plain text; special tokens are put in between by PartsTokenizer, so no text can spell
one. The network is opened by the library alone, and only for a named encoding that has no file here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovllm.errors import RequestError, TokenizerError

from .base import MAX_VOCAB, eos_id, guarded
from .beside import Beside, added_token, read_beside
from .chat import choose_template
from .config import TiktokenOptions
from .controls import ControlTokens
from .known import KNOWN, Known, known
from .parts import PartsTokenizer
from .ranks import is_rank_file, read_ranks


def find_ranks(directory: Path) -> Path | None:
    """The only *.tiktoken, or a tokenizer.model that is a rank file. TokenizerError where there are several."""
    files = sorted(directory.glob("*.tiktoken"))
    if len(files) > 1:
        raise TokenizerError(
            f"{directory} holds several rank files: {', '.join(file.name for file in files)}",
            hint="set tokenizer.path to one of them, or tokenizer.encoding",
        )
    llama = directory / "tokenizer.model"
    return files[0] if files else llama if is_rank_file(llama) else None


def load(path: Path | None, options: TiktokenOptions) -> TiktokenTokenizer:
    """The tokenizer of a rank file, of a directory that holds one, or of the encoding that `options` name.

    Raises TokenizerError: the library or the file is missing, the file is wrong (with its line), or
    neither it nor `options` say how a text is split.
    """
    library = _library()
    encoding = _named(library, options)
    directory = path if path is None or path.is_dir() else path.parent
    file = path
    if directory is not None and directory == path:
        published = None if encoding is None else directory / encoding.file
        file = published if published is not None and published.is_file() else find_ranks(directory)
    if encoding is None:
        encoding = _of_file(file, path)
    beside = read_beside(directory)
    special = {text: added_token(i, text, True) for text, i in encoding.special.items()}
    special |= {token["content"]: token for token in beside.added()}
    special |= {text: added_token(i, text, True) for text, i in options.special_tokens.items()}
    template = choose_template(options.chat_template, directory, beside.config, special.keys())
    if file is None:
        ranks = _published_ranks(library, encoding)
    else:
        ranks = read_ranks(file, {token["id"] for token in special.values()})
        if encoding.num_ranks not in (None, len(ranks)):
            raise TokenizerError(
                f"{file} has {len(ranks)} tokens, but its encoding has {encoding.num_ranks}",
                hint="download it again, or set tokenizer.encoding, or tokenizer.pattern for one of your own",
            )
    name = encoding.file if file is None else str(file)
    return TiktokenTokenizer(library, name, encoding, ranks, list(special.values()), beside, template)


class TiktokenTokenizer(PartsTokenizer):
    def __init__(
        self,
        library: Any,  # the tiktoken module
        name: str,  # of the rank file, for errors
        encoding: Known,
        ranks: dict[bytes, int],
        special: list[dict[str, Any]],  # as a tokenizer.json's added_tokens
        beside: Beside,
        template: Any,
    ) -> None:
        id_of = {token["content"]: token["id"] for token in special}
        used = set(ranks.values())
        for text, i in id_of.items():
            if i in used or i >= MAX_VOCAB:
                raise TokenizerError(
                    f"{name}: the special token {text!r} cannot have the id {i}, which is a rank's or too large",
                    hint="correct tokenizer.special_tokens, or the added tokens in tokenizer_config.json",
                )
        own = {"bos_token": encoding.bos, "eos_token": next(iter(encoding.eos), None)}
        names = {key: text for key, text in own.items() if text is not None} | beside.names
        ends = {
            "bos_token": beside.switch("add_bos_token", default=encoding.bos is not None),
            "eos_token": beside.switch("add_eos_token", default=False),
        }
        before, after = ([id_of[names[key]]] if add and names.get(key) in id_of else [] for key, add in ends.items())
        eos = (beside.names["eos_token"],) if "eos_token" in beside.names else encoding.eos
        table = [b""] * (max([*used, *id_of.values()]) + 1)
        for token, i in ranks.items():
            table[i] = token
        for token in special:
            table[token["id"]] = b"" if token["special"] else token["content"].encode()
        super().__init__(
            before=before,
            after=after,
            token_bytes=table,
            eos_ids=tuple(eos_id(text, id_of, name) for text in eos),
            controls=ControlTokens(special, ()),
            names=names,
            template=template,
        )
        self._pattern = encoding.pattern
        self._library = guarded(
            "tiktoken", f"refuses {name} or the pattern {encoding.pattern!r}",
            library.Encoding, name, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens={},
        )  # fmt: skip

    def _plain(self, text: str, is_first: bool) -> list[int]:
        try:
            ids: list[int] = self._library.encode_ordinary(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # its panics are no Exceptions: a run of a million spaces, for some patterns
            raise RequestError(f"the tiktoken library cannot split a text of {len(text)} characters: {e}") from e
        if sum(len(self._bytes[i]) for i in ids) != len(text.encode()):
            raise TokenizerError(
                f"the pattern {self._pattern!r} leaves parts of a text out", hint="correct tokenizer.pattern"
            )
        return ids


def _named(library: Any, options: TiktokenOptions) -> Known | None:
    if options.pattern is not None:
        return Known(options.pattern, file="*.tiktoken", num_ranks=None, special={}, eos=())
    if options.model_name is None:
        return None if options.encoding is None else known(options.encoding)
    try:
        return known(library.encoding_name_for_model(options.model_name))
    except KeyError:
        raise TokenizerError(
            f"tiktoken knows no model named {options.model_name!r}", hint="set tokenizer.encoding instead"
        ) from None


def _of_file(file: Path | None, path: Path | None) -> Known:
    """The encoding that a rank file's name stands for."""
    if file is None:
        raise TokenizerError(
            f"there is no rank file in {path}" if path else "neither a rank file nor an encoding is named",
            hint="set tokenizer.path to a *.tiktoken file, or tokenizer.encoding to a name",
        )
    if file.stem in KNOWN:
        return KNOWN[file.stem]
    if file.name == "tokenizer.model":
        return KNOWN["llama3"]  # the only one that is published so; the number of its tokens is checked
    raise TokenizerError(
        f"{file} does not say how a text is split, and its name is of no known encoding",
        hint=f"set tokenizer.encoding ({', '.join(KNOWN)}) or tokenizer.pattern",
    )


def _published_ranks(library: Any, encoding: Known) -> dict[bytes, int]:
    """From the library's cache, or else from where it downloads."""
    name, _, suffix = encoding.file.partition(".")
    if suffix != "tiktoken" or name not in KNOWN:
        raise TokenizerError(
            f"there is no {encoding.file}, and this encoding cannot be downloaded",
            hint="set tokenizer.path to the rank file",
        )
    try:
        published = library.get_encoding(name)
    except Exception as e:  # of requests, of the file system, or of the hash
        raise TokenizerError(
            f"the tiktoken library cannot download the encoding {name} ({type(e).__name__})",
            hint=f"get {encoding.file} and set tokenizer.path to it",
        ) from e
    special = {published.encode_single_token(text) for text in published.special_tokens_set}
    ids = [i for i in range(encoding.num_ranks + 1) if i not in special][: encoding.num_ranks]
    return {published.decode_single_token_bytes(i): i for i in ids}


def _library() -> Any:
    try:
        import tiktoken
    except ImportError as e:
        raise TokenizerError(
            f"the tiktoken library is not installed ({e})",
            hint="try: pip install 'nanovllm-tokenizers[tiktoken]'",
        ) from e
    return tiktoken
