"""The `tiktoken` tokenizer against the library: ids, special tokens, encodings by name, broken rank files."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from nanovllm.errors import RequestError, TokenizerError
from nanovllm_tokenizers.config import TiktokenOptions
from nanovllm_tokenizers.known import KNOWN
from nanovllm_tokenizers.tiktoken import TiktokenTokenizer, load
from support import DATA, needs_data

FILES = {
    "cl100k_base": ("openai/cl100k_base.tiktoken", "openai/golden_cl100k_base.json"),
    "o200k_base": ("openai/o200k_base.tiktoken", "openai/golden_o200k_base.json"),
    "p50k_base": ("openai/p50k_base.tiktoken", "openai/golden_p50k_base.json"),
    "r50k_base": ("gpt2/r50k_base.tiktoken", "gpt2/golden_r50k_base_tiktoken.json"),
}
# Meta's own spelling, from llama3's tokenizer.py; ours is the possessive one of cl100k_base.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERN = KNOWN["cl100k_base"].pattern
RANKS = {bytes([b]): b for b in range(256)} | {b"he": 256, b"ll": 257, b"hell": 258, b" w": 259, b"\xc3\xa9": 260}
SPECIAL = {"<|end|>": 261, "<|start|>": 265}


def rank_lines(ranks: dict[bytes, int] = RANKS) -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]


def write(directory: Path, lines: list[str], name: str = "my.tiktoken", **files: object) -> Path:
    (directory / name).write_text("".join(lines))
    for stem, value in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(value))
    return directory


def options(**given: object) -> TiktokenOptions:
    return TiktokenOptions(**given)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> TiktokenTokenizer:
    directory = write(tmp_path_factory.mktemp("small"), rank_lines())
    return load(directory, options(pattern=PATTERN, special_tokens=SPECIAL))


LIBRARY = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens=SPECIAL)
LLAMA3 = tiktoken.Encoding("llama", pat_str=LLAMA3_PATTERN, mergeable_ranks=RANKS, special_tokens={})
texts = st.lists(st.sampled_from([*SPECIAL, "<|", "hello", "  ", "\n", "'LL", "123", "é"]) | st.text(max_size=4)).map(
    "".join
)


# ------------------------------------------------------------------------------------ ids of a text


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_golden_ids_of_the_published_encodings(name):
    file, golden_file = (DATA / "tokenizers" / part for part in FILES[name])
    golden = json.loads(golden_file.read_text("utf-8"))
    t = load(file, options())
    assert len(golden["cases"]) == 59
    for case in golden["cases"]:
        assert t.encode(case["text"]) == case["ids"]
        assert t.encode(case["text"], parse_special=True) == case.get("ids_with_special_parsed", case["ids"])
        assert t.decode(case["ids"]) == case["decoded"]
    assert t.vocab_size == golden["n_vocab"]
    assert KNOWN[name].pattern == golden["pattern"]
    assert KNOWN[name].special == golden["special_tokens"]
    assert t.eos_ids == (golden["special_tokens"]["<|endoftext|>"],)


@given(texts)
def test_plain_text_gives_the_librarys_ordinary_ids(small, text):
    assert small.encode(text) == LIBRARY.encode_ordinary(text)


@given(texts)
def test_parsing_special_tokens_gives_the_librarys_ids(small, text):
    assert small.encode(text, parse_special=True) == LIBRARY.encode(text, allowed_special="all")


@given(texts)
def test_a_text_comes_back(small, text):
    assert small.decode(small.encode(text)) == text


@given(st.text(alphabet="aZé東1234'sSlL \n\r\t.!", max_size=30))
def test_llama_3_splits_as_its_pattern_is_published(small, text):
    assert small.encode(text) == LLAMA3.encode_ordinary(text)


def test_special_and_undefined_ids_have_no_bytes(small):
    assert small.vocab_size == 266
    assert [small.token_bytes(i) for i in (261, 263, 265, 266, -1)] == [b""] * 5
    assert [small.token_bytes(i) for i in (0, 200, 258, 260)] == [b"\0", b"\xc8", b"hell", "é".encode()]


def test_a_text_that_the_library_cannot_take_is_the_callers_error(tmp_path):
    t = load(write(tmp_path, rank_lines()), options(pattern=LLAMA3_PATTERN))
    with pytest.raises(RequestError, match="surrogate"):
        t.encode("\ud800")
    with pytest.raises(RequestError, match="cannot split a text of 1000000 characters"):
        t.encode(" " * 1_000_000)
    assert t.encode("hello") == LLAMA3.encode_ordinary("hello")


def test_a_pattern_that_leaves_text_out_is_refused_instead_of_dropping_it(tmp_path):
    t = load(write(tmp_path, rank_lines()), options(pattern=r"\p{L}+"))
    assert t.encode("hello") == [258, ord("o")]
    with pytest.raises(TokenizerError, match=r"leaves parts of a text out; correct tokenizer\.pattern"):
        t.encode("hello world")


# ----------------------------------------------------------------------------------- which encoding it is


@needs_data
def test_by_the_name_of_a_model(tmp_path):
    shutil.copy(DATA / "tokenizers/gpt2/r50k_base.tiktoken", tmp_path)
    for named in ({"model_name": "gpt2"}, {"encoding": "gpt2"}, {"encoding": "r50k_base"}, {}):
        t = load(tmp_path, options(**named))
        assert t.eos_ids == (50256,)
        assert t.encode("hello world<|endoftext|>", parse_special=True) == [31373, 995, 50256]
    with pytest.raises(TokenizerError, match="knows no model named 'gtp2'"):
        load(tmp_path, options(model_name="gtp2"))
    with pytest.raises(TokenizerError, match=r"no encoding named 'x' is known.*have: gpt2"):
        load(tmp_path, options(encoding="x"))
    with pytest.raises(TokenizerError, match=r"r50k_base\.tiktoken.*line 50257.*must be 50258|50256 tokens, but"):
        load(tmp_path, options(encoding="cl100k_base"))


@needs_data
def test_every_encoding_of_the_library_is_as_the_library_has_it(monkeypatch):
    """Its own definitions, over the rank files at hand instead of its downloads."""

    def local(url: str, expected_hash: str | None = None) -> dict[bytes, int]:
        file = DATA / "tokenizers" / FILES[url.rsplit("/", 1)[1].partition(".")[0]][0]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == expected_hash
        return {base64.b64decode(a): int(b) for a, b in map(bytes.split, file.read_bytes().splitlines())}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", local)
    for name in set(openai_public.ENCODING_CONSTRUCTORS) - {"gpt2"}:
        theirs = openai_public.ENCODING_CONSTRUCTORS[name]()
        ours = KNOWN[name]
        assert (ours.pattern, ours.num_ranks) == (theirs["pat_str"], len(theirs["mergeable_ranks"]))
        assert {t: i for t, i in ours.special.items() if t in theirs["special_tokens"]} == theirs["special_tokens"]
        assert set(ours.special) == set(theirs["special_tokens"])
    assert KNOWN["gpt2"] == KNOWN["r50k_base"]


def llama3(directory: Path) -> Path:
    """A file of Llama 3's shape: 128,000 ranks under the name tokenizer.model."""
    ranks = dict(RANKS)
    for i in range(len(ranks), 128_000):
        ranks[b"\xff" + i.to_bytes(3, "big")] = i
    return write(directory, rank_lines(ranks), "tokenizer.model")


def test_a_tokenizer_model_that_is_a_rank_file_is_llama_3s(tmp_path):
    t = load(llama3(tmp_path), options())
    assert t.vocab_size == 128_256
    assert t.eos_ids == (128001, 128008, 128009)
    assert t.encode("hello") == [128000, 258, ord("o")]
    header = [128000, 128006, *t.encode("user")[1:], 128007, *t.encode("\n\n")[1:]]
    ids = t.chat([{"role": "user", "content": " hello<|eot_id|> "}])
    assert ids[: len(header)] == header
    assert ids.count(128009) == 1
    assert t.decode(ids) == "user\n\nhello<|eot_id|>assistant\n\n"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "eos_token": "<|eot_id|>"}))
    t = load(tmp_path, options())
    assert t.encode("hello") == [258, ord("o")]
    assert t.eos_ids == (128009,)
    lines = (tmp_path / "tokenizer.model").read_text().splitlines(keepends=True)
    write(tmp_path, lines[:-1], "tokenizer.model")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model has 127999 tokens, but its encoding has 128000"):
        load(tmp_path, options())


def test_special_tokens_come_from_the_config_and_the_options(tmp_path):
    decoder = {"261": {"content": "<|end|>", "special": True}, "262": {"content": "word", "special": False}}
    config = {"added_tokens_decoder": decoder, "eos_token": "<|end|>", "bos_token": "<|end|>", "add_bos_token": True}
    write(tmp_path, rank_lines(), tokenizer_config=config)
    t = load(tmp_path, options(pattern=PATTERN, special_tokens={"<|more|>": 300}))
    assert t.eos_ids == (261,)
    assert t.encode("<|end|>word<|more|>", parse_special=True) == [261, 261, 262, 300]
    assert t.encode("wordword") == [261, 262, 262]
    assert t.decode([261, 262, 300]) == "word"
    with pytest.raises(TokenizerError, match="line 6: the rank 5 is also the id of a special token"):
        load(tmp_path, options(pattern=PATTERN, special_tokens={"<|x|>": 5}))
    with pytest.raises(TokenizerError, match="'x' cannot have the id 99999999"):
        load(tmp_path, options(pattern=PATTERN, special_tokens={"x": 99999999}))
    with pytest.raises(TokenizerError, match=r"refuses .*the pattern"):
        load(tmp_path, options(pattern="(", special_tokens=SPECIAL))


def test_a_file_that_does_not_say_how_a_text_is_split_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="there is no rank file in"):
        load(tmp_path, options())
    write(tmp_path, rank_lines())
    with pytest.raises(TokenizerError, match=r"my\.tiktoken does not say how a text is split.*tokenizer\.pattern"):
        load(tmp_path, options())
    write(tmp_path, rank_lines(), "other.tiktoken")
    with pytest.raises(TokenizerError, match=r"several rank files: my\.tiktoken, other\.tiktoken"):
        load(tmp_path, options(pattern=PATTERN))
    assert load(tmp_path / "my.tiktoken", options(pattern=PATTERN)).encode("he") == [256]


def test_options_are_strict():
    for both in ({"encoding": "a", "pattern": "b"}, {"encoding": "a", "model_name": "b"}):
        with pytest.raises(ValueError, match="exclude each other"):
            options(**both)
    for wrong in ({"special_tokens": {"": 1}}, {"special_tokens": {"a": -1}}, {"encodnig": "a"}):
        with pytest.raises(ValueError):
            options(**wrong)


# -------------------------------------------------------------------------------------------- the network


@pytest.fixture
def no_network(monkeypatch) -> list[str]:
    asked: list[str] = []

    def refuse(url: str) -> bytes:
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    return asked


def test_only_a_named_encoding_without_a_file_opens_the_network(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(TokenizerError, match="no rank file"):
        load(tmp_path, options())
    with pytest.raises(TokenizerError, match=r"there is no tokenizer\.model, and this encoding cannot be downloaded"):
        load(None, options(encoding="llama3"))
    with pytest.raises(TokenizerError, match="cannot be downloaded"):
        load(tmp_path, options(pattern=PATTERN))
    assert no_network == []
    for path in (None, tmp_path):
        with pytest.raises(
            TokenizerError, match=r"cannot download the encoding o200k_base \(OSError\); get o200k_base.ti"
        ):
            load(path, options(model_name="gpt-4o"))
    assert len(no_network) == 2


@needs_data
def test_a_named_encoding_in_the_librarys_cache_needs_no_network(tmp_path, monkeypatch, no_network):
    url = "https://openaipublic.blob.core.windows.net/encodings/p50k_base.tiktoken"
    shutil.copy(DATA / "tokenizers/openai/p50k_base.tiktoken", tmp_path / hashlib.sha1(url.encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    t = load(None, options(encoding="p50k_base"))
    golden = json.loads((DATA / "tokenizers/openai/golden_p50k_base.json").read_text("utf-8"))
    for case in golden["cases"]:
        assert t.encode(case["text"]) == case["ids"]
    assert no_network == []


def test_without_the_library_the_pip_line_is_shown(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(TokenizerError, match=r"not installed.*pip install 'nanovllm-tokenizers\[tiktoken\]'"):
        load(tmp_path, options())


# --------------------------------------------------------------------------------------- broken rank files


def changed(i: int, line: str) -> list[str]:
    return [*rank_lines()[:i], line, *rank_lines()[i + 1 :]]


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([], r"line 1: it ends here, with no token for the byte 0x00"),
        (rank_lines()[:200], r"line 201: it ends here, with no token for the byte 0xC8"),
        ([*rank_lines()[:258], "aGVsb"], r"line 259: 'aGVsb' is not a token in base64 and its rank"),
        ([*rank_lines()[:258], rank_lines()[258][:-3]], r"line 259: the rank is 2, but the next one must be 258"),
        (changed(257, "bGw= 256\n"), r"line 258: the rank is 256, but the next one must be 257"),
        (changed(257, "bGw= 258\n"), r"line 258: the rank is 258, but the next one must be 257"),
        (changed(257, "aGU= 257\n"), r"line 258: the token b'he' has the rank 256 already"),
        (changed(257, "bGw 257\n"), r"line 258: 'bGw' is not base64"),
        (changed(257, "b*w= 257\n"), r"line 258: 'b\*w= 257' is not a token"),
        (changed(257, "bGw= 257.0\n"), r"line 258: .* is not a token"),
        (changed(257, "bGw= -257\n"), r"line 258: .* is not a token"),
        (changed(257, "bGw= ٢٥٧\n"), r"line 258: .* is not a token"),
        (changed(257, "bGw= 99999999999\n"), r"line 258: .* is not a token"),
        (changed(257, "bGw=\n"), r"line 258: .* is not a token"),
        (changed(257, "bGw= 257 1\n"), r"line 258: .* is not a token"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, named):
    file = tmp_path / "my.tiktoken"
    file.write_text("".join(lines), "utf-8")
    with pytest.raises(TokenizerError, match=named) as caught:
        load(tmp_path, options(pattern=PATTERN))
    assert str(file) in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "my.tiktoken").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError, match=r"my\.tiktoken is not UTF-8"):
        load(tmp_path, options(pattern=PATTERN))


def test_ids_of_special_tokens_are_no_gaps(tmp_path):
    ranks = {token: rank + (rank >= 258) for token, rank in RANKS.items()}
    write(tmp_path, [*rank_lines(ranks)[:100], "\n", *rank_lines(ranks)[100:]])
    t = load(tmp_path, options(pattern=PATTERN, special_tokens={"<|end|>": 258}))
    assert t.encode("hell<|end|>", parse_special=True) == [259, 258]
    with pytest.raises(TokenizerError, match="line 260: the rank is 259, but the next one must be 258"):
        load(tmp_path, options(pattern=PATTERN))
