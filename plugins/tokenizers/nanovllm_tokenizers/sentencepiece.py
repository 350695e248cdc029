"""`SentencePieceTokenizer`: a SentencePiece .model through the sentencepiece library.

The library encodes plain text. Control pieces, and user-defined ones that are spelled like them, are put
in between by PartsTokenizer, so no text can spell one. This file knows no chat template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovllm.errors import TokenizerError

from .base import MAX_VOCAB, eos_id, guarded
from .beside import Beside, added_token, read_beside
from .chat import choose_template
from .controls import ControlTokens, is_control, is_tag
from .parts import PartsTokenizer
from .sentencepiece_file import NO_DUMMY_PREFIX, Kind, ModelFile

MIN_LIBRARY = "0.2.1"  # CVE-2026-1260: a model file could overflow the heap of earlier ones
_HIDDEN = (Kind.UNKNOWN, Kind.CONTROL, Kind.BYTE)  # pieces that the library itself finds in no text
_PIP = "try: pip install 'nanovllm-tokenizers[sentencepiece]'"


def find_model(directory: Path) -> Path | None:
    """tokenizer.model, spiece.model, or the only other *.model. Raises TokenizerError where there are several."""
    for name in ("tokenizer.model", "spiece.model"):
        if (directory / name).is_file():
            return directory / name
    models = sorted([*directory.glob("*.model"), *directory.glob("*.model.v[0-9]*")])
    if len(models) > 1:
        raise TokenizerError(
            f"{directory} holds several models: {', '.join(file.name for file in models)}",
            hint="set tokenizer.path to one of them",
        )
    return models[0] if models else None


def load(path: Path, chat_template: str | None = None) -> SentencePieceTokenizer:
    """The tokenizer of a .model file or of the directory that holds one.

    `chat_template`: a built-in one's name, or the jinja file that replaces the directory's own.
    Raises TokenizerError: the library or the file is missing, or one of the files is not what it should be.
    """
    library = _library()
    file = find_model(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise TokenizerError(
            f"there is no {path / 'tokenizer.model' if path.is_dir() else path}",
            hint="set tokenizer.path to a SentencePiece model or to its directory",
        )
    return SentencePieceTokenizer(library, ModelFile(file), read_beside(file.parent), chat_template)


class SentencePieceTokenizer(PartsTokenizer):
    def __init__(self, library: Any, file: ModelFile, beside: Beside, chat_template: str | None) -> None:
        """`library`: the sentencepiece module. BOS and EOS are the model's own where `beside` names none."""
        self._file = file.path
        original = self._processor(library, file.data)
        pieces = [piece.text for piece in file.pieces]
        own = {
            "bos_token": original.bos_id(),
            "eos_token": original.eos_id(),
            "unk_token": original.unk_id(),
            "pad_token": original.pad_id(),
        }
        names = {name: pieces[i] for name, i in own.items() if i >= 0} | beside.names
        added = {
            i: added_token(i, text, True)
            for i, (text, kind) in enumerate(file.pieces)
            if kind in (Kind.UNKNOWN, Kind.CONTROL) or (kind == Kind.USER_DEFINED and is_tag(text.strip("▁")))
        }
        added |= {token["id"]: token for token in beside.added()}  # its names and flags win
        if max(added, default=0) >= MAX_VOCAB:
            raise TokenizerError(
                f"{file.path.parent}: an added token has the id {max(added)}; the largest is {MAX_VOCAB - 1}",
                hint="correct the added tokens in tokenizer_config.json or added_tokens.json",
            )
        id_of = {text: i for i, text in enumerate(pieces)} | {t["content"]: i for i, t in added.items()}

        vocabulary = {text for text, kind in file.pieces if kind in (Kind.NORMAL, Kind.UNUSED)}
        controls = {i for i, token in added.items() if is_control(token, vocabulary)}
        ends = {name: id_of.get(names[name]) for name in ("bos_token", "eos_token") if name in names}
        wanted = {
            "bos_token": beside.switch("add_bos_token", default=ends.get("bos_token") is not None),
            "eos_token": beside.switch("add_eos_token", default=False),
        }
        for name, add in wanted.items():
            if add and ends.get(name) is None:
                raise TokenizerError(
                    f"{file.path.parent}: add_{name} is true, but there is no {name}",
                    hint=f"name the {name} in tokenizer_config.json",
                )
        super().__init__(
            before=[ends["bos_token"]] if wanted["bos_token"] else [],
            after=[ends["eos_token"]] if wanted["eos_token"] else [],
            token_bytes=_token_bytes(file, added),
            eos_ids=(eos_id(names["eos_token"], id_of, str(file.path)),) if "eos_token" in names else (),
            controls=ControlTokens(list(added.values()), vocabulary),
            names=names,
            template=choose_template(
                chat_template, file.path.parent, beside.config, {token["content"] for token in added.values()}
            ),
        )
        data = file.with_controls(i for i in controls if i < len(pieces) and file.pieces[i].kind not in _HIDDEN)
        self._library = original if data == file.data else self._processor(library, data)
        # What follows a control token begins with the space that begins a text, as for every stretch that
        # the library is given alone; transformers' "legacy": false means that it does not.
        self._inner = self._library
        if not beside.switch("legacy", default=True):
            self._inner = self._processor(library, data + NO_DUMMY_PREFIX)

    def _processor(self, library: Any, data: bytes) -> Any:
        processor = library.SentencePieceProcessor()
        guarded("sentencepiece", f"refuses {self._file}", processor.LoadFromSerializedProto, data)
        return processor

    def _plain(self, text: str, is_first: bool) -> list[int]:
        encode = (self._library if is_first else self._inner).EncodeAsIds
        return guarded("sentencepiece", f"cannot encode a text with {self._file}", encode, text)


def _token_bytes(file: ModelFile, added: dict[int, dict[str, Any]]) -> list[bytes]:
    """What a piece shows wherever it stands: the space before the first word of a text is not dropped."""
    table = [b""] * max(len(file.pieces), *(i + 1 for i in added), 1)
    for i, (text, kind) in enumerate(file.pieces):
        if kind == Kind.BYTE:
            table[i] = bytes([int(text[3:5], 16)])  # <0x0A>, which the library has checked
        elif kind not in (Kind.UNKNOWN, Kind.CONTROL):
            table[i] = text.replace("▁", " ").encode()
    for i, token in added.items():
        if i >= len(file.pieces) or token["content"] != file.pieces[i].text:
            table[i] = b"" if token["special"] else token["content"].encode()
    return table


def _library() -> Any:
    try:
        import sentencepiece
    except ImportError as e:
        raise TokenizerError(f"the sentencepiece library is not installed ({e})", hint=_PIP) from e
    from packaging.version import Version

    if Version(sentencepiece.__version__) < Version(MIN_LIBRARY):
        raise TokenizerError(
            f"sentencepiece {sentencepiece.__version__} is installed; before {MIN_LIBRARY} a model file could overflow "
            "the heap (CVE-2026-1260)",
            hint=_PIP,
        )
    return sentencepiece
