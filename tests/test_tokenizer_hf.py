"""The `hf` tokenizer against the tokenizers library itself: ids, bytes of each token, special tokens, bad files."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanovllm.errors import RequestError, TokenizerError
from nanovllm.tokenizer import TokenStream
from nanovllm_tokenizers.hf import HFTokenizer, load
from support import DATA, needs_data

REAL = ["tokenizers/gpt2", "tokenizers/qwen2", "tokenizers/t5", "checkpoints/stories260k", "checkpoints/slm4096-gpt2"]
TEXT = [
    "the cat sat on the mat",
    "hello world, hello there!",
    "naïve café — 東京 🙂",
    "def f(x):\n    return x  # ok",
] * 3

# Every flag that an added token can carry. <tool> is a tag without the `special` flag; "   " and "wordish" are text.
ADDED = [
    AddedToken("<s>", special=True, normalized=False),
    AddedToken("</s>", special=True, normalized=False),
    AddedToken("<|end|>", special=True, normalized=False, rstrip=True),
    AddedToken("<mask>", special=True, normalized=False, lstrip=True),
    AddedToken("<w>", special=True, normalized=False, single_word=True),
    AddedToken("<s><s>", special=True, normalized=False),
    AddedToken("<Norm>", special=True, normalized=False),
    AddedToken("<tool>", special=False, normalized=False),
    AddedToken("   ", special=False, normalized=False),
    AddedToken("wordish", special=False, normalized=True, single_word=True),
]
CONTROLS = [t.content for t in ADDED if t.content.startswith("<")]


def byte_level() -> Tokenizer:
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    t.add_tokens(ADDED)
    return t


def llama_like() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁helowrdtcasm", "he", "▁he", "▁t", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("h", "e"), ("▁", "he"), ("▁", "t"), ("▁", "▁")]
    t = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    t.decoder = decoders.Sequence(steps)
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
    t.add_tokens(ADDED)
    return t


def unigram() -> Tokenizer:
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.NFKC()
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>", "<tool>"]
    t.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=90, special_tokens=specials, unk_token="<unk>", show_progress=False)
    )
    t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    t.add_tokens([token for token in ADDED if token.content != "<tool>"])
    return t


def ours(library: Tokenizer, **names: str) -> HFTokenizer:
    return HFTokenizer(json.loads(library.to_str()), names, None, "tokenizer.json")


LIBRARY = {"byte_level": byte_level(), "llama_like": llama_like(), "unigram": unigram()}
OURS = {kind: ours(library) for kind, library in LIBRARY.items()}
kinds = st.sampled_from(sorted(LIBRARY))
fragments = st.sampled_from(
    [*CONTROLS, "<", "s>", "|end|>", "  ", "   ", " ", "\n", "wordish", "hello", "東", "é", "🙂", "w"]
)
texts = st.lists(st.one_of(fragments, st.text(max_size=4)), max_size=12).map("".join)


# ------------------------------------------------------------------------------------ ids of a text


@given(kinds, texts)
def test_parsing_special_tokens_gives_the_librarys_ids(kind, text):
    assert OURS[kind].encode(text, parse_special=True) == LIBRARY[kind].encode(text).ids


@given(kinds, texts)
def test_text_never_becomes_a_control_token(kind, text):
    added_by_the_file = LIBRARY[kind].encode("").ids
    ids = OURS[kind].encode(text)
    controls = {LIBRARY[kind].token_to_id(c) for c in CONTROLS}
    assert [i for i in ids if i in controls] == added_by_the_file
    assert ids == ours_without_controls(kind).encode(text).ids


def ours_without_controls(kind: str, cache: dict = {}) -> Tokenizer:  # noqa: B006  (a cache on purpose)
    """The oracle for plain text: the same library, which has never heard of the control tokens."""
    if kind not in cache:
        spec = json.loads(LIBRARY[kind].to_str())
        names = {
            t["content"]: f"\ue000{t['id']}\ue001" for t in spec["added_tokens"] if t["content"] in {*CONTROLS, "<unk>"}
        }
        text = json.dumps(spec, ensure_ascii=False)
        for content, name in names.items():
            text = text.replace(json.dumps(content, ensure_ascii=False), json.dumps(name, ensure_ascii=False))
        cache[kind] = Tokenizer.from_str(text)
    return cache[kind]


def test_a_control_token_is_taken_as_written_whatever_the_normaliser_does():
    for kind in LIBRARY:
        spec = json.loads(LIBRARY[kind].to_str())
        for token in spec["added_tokens"]:
            token["normalized"] = True
        t = HFTokenizer(spec, {}, None, "tokenizer.json")
        i = LIBRARY[kind].token_to_id("<Norm>")
        assert [x for x in t.encode("<Norm><Norm> <norm>", parse_special=True) if x == i] == [i, i]
        assert i not in t.encode("<Norm> ＜Norm＞")
        assert i not in t.encode("＜Norm＞", parse_special=True)


@given(texts)
def test_a_byte_level_text_comes_back_exactly(text):
    t = OURS["byte_level"]
    assert t.decode(t.encode(text)) == text


def test_two_threads_that_differ_in_parse_special_do_not_disturb_each_other():
    t = OURS["byte_level"]
    text = "hello <s> world <|end|> " * 20
    expected = {flag: t.encode(text, parse_special=flag) for flag in (False, True)}
    assert expected[False] != expected[True]
    with ThreadPoolExecutor(4) as pool:
        flags = [i % 2 == 0 for i in range(400)]
        assert list(pool.map(lambda flag: t.encode(text, flag), flags)) == [expected[flag] for flag in flags]


def test_settings_for_training_do_not_change_prompts():
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=50)
    spec = json.loads(library.to_str())
    spec["model"]["dropout"] = 0.9
    t = HFTokenizer(spec, {}, None, "tokenizer.json")
    text = "hello world, the cat sat on the mat"
    assert {tuple(t.encode(text)) for _ in range(5)} == {tuple(OURS["byte_level"].encode(text))}


def test_a_lone_surrogate_is_refused():
    for parse_special in (False, True):
        with pytest.raises(RequestError, match="surrogate"):
            OURS["byte_level"].encode("a\ud800", parse_special)


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_golden_ids_of_real_tokenizers(name):
    (golden,) = [p for p in (DATA / name).glob("golden*.json") if "tiktoken" not in p.name]
    cases = json.loads(golden.read_text("utf-8"))["cases"]
    t = load(DATA / name)
    assert len(cases) >= 58
    for case in cases:
        assert t.encode(case["text"], parse_special=True) == case.get("ids_add_special_tokens", case["ids"])


@needs_data
def test_a_file_and_its_directory_are_the_same_tokenizer():
    directory = DATA / "checkpoints/stories260k"
    by_file, by_directory = load(directory / "tokenizer.json"), load(directory)
    for case in json.loads((directory / "reference.json").read_text("utf-8"))["cases"]:
        assert by_file.encode(case["prompt"]) == by_directory.encode(case["prompt"]) == case["input_ids"]
    assert by_file.eos_ids == by_directory.eos_ids == (2,)


# ------------------------------------------------------------------------------- bytes of each token


def library_text(library: Tokenizer, ids: list[int]) -> str:
    return library.decode(ids, skip_special_tokens=True)


def check_bytes(kind: str, t: HFTokenizer, library: Tokenizer, ids: list[int]) -> None:
    data = b"".join(map(t.token_bytes, ids))
    assert t.decode(ids) == data.decode("utf-8", "replace")
    expected = library_text(library, ids)
    if kind == "byte_level":
        assert data.decode("utf-8", "replace") == expected
        return
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return  # the library shows one U+FFFD per byte here, we show what UTF-8 decoders agree on
    # The library drops the space before the first word of a text; a continuation keeps it.
    assert text.lstrip(" ") == expected.lstrip(" ")
    assert 0 <= len(text) - len(expected) <= len(text) - len(text.lstrip(" "))


@given(kinds, st.data())
def test_bytes_of_tokens_join_to_the_librarys_text(kind, data):
    t = OURS[kind]
    ids = data.draw(st.lists(st.integers(0, t.vocab_size - 1), max_size=20))
    check_bytes(kind, t, LIBRARY[kind], ids)


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_bytes_of_tokens_join_to_the_librarys_text_for_real_files(name):
    t, library = load(DATA / name), Tokenizer.from_file(str(DATA / name / "tokenizer.json"))
    kind = "byte_level" if name.endswith(("gpt2", "qwen2")) else name
    draw = random.Random(1)
    for length in [1, 2, 5, 20] * 150:
        check_bytes(kind, t, library, [draw.randrange(t.vocab_size) for _ in range(length)])
    for line in TEXT:
        check_bytes(kind, t, library, library.encode(line).ids)


@given(kinds, st.data())
def test_a_stream_shows_what_decode_shows(kind, data):
    t = OURS[kind]
    ids = data.draw(st.lists(st.integers(-5, t.vocab_size + 100), max_size=20))
    stream = TokenStream(t.token_bytes)
    assert "".join(stream.feed([i]) for i in ids) + stream.flush() == t.decode(ids)


def test_special_and_undefined_ids_have_no_bytes():
    t, library = OURS["byte_level"], LIBRARY["byte_level"]
    assert t.token_bytes(library.token_to_id("<s>")) == b""
    assert t.token_bytes(library.token_to_id("<tool>")) == b"<tool>"  # part of an answer, though users cannot write it
    assert t.token_bytes(t.vocab_size) == t.token_bytes(-1) == t.token_bytes(10**12) == b""
    assert t.vocab_size == library.get_vocab_size()


def test_an_added_word_keeps_the_space_that_its_id_stands_for():
    t, library = OURS["llama_like"], LIBRARY["llama_like"]
    i = library.token_to_id("wordish")
    assert t.token_bytes(i) == b" wordish"
    assert t.decode([*library.encode("hello").ids, i]) == " hello wordish"


def test_a_character_flagged_special_stays_a_character():
    library = byte_level()
    library.add_special_tokens(["!"])  # as padding, in some files
    t = ours(library)
    i = library.token_to_id("!")
    assert t.encode("hello!") == t.encode("hello!", parse_special=True) == library.encode("hello!").ids
    assert t.encode("hello!")[-1] == i


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.CTC(), "CTC"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]), "Strip"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), "Replace"),
    ],
)
def test_a_decoder_that_looks_at_neighbours_is_refused_by_name(decoder, named):
    library = byte_level()
    library.decoder = decoder
    with pytest.raises(TokenizerError, match=f"tokenizer.json: its decoder uses .*{named}"):
        ours(library)


def test_without_a_decoder_pieces_are_words():
    library = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    t = ours(library)
    assert t.decode([0, 1]) == " " + library.decode([0, 1]) == " hello world"


# ------------------------------------------------------------------------------------------- files


def write(directory: Path, library: Tokenizer, **files: object) -> Path:
    library.save(str(directory / "tokenizer.json"))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


@pytest.mark.parametrize(
    ("config", "special_map", "expected"),
    [
        ({"eos_token": "</s>"}, {}, "</s>"),
        ({"eos_token": {"content": "<|end|>", "lstrip": False}}, {"eos_token": "</s>"}, "<|end|>"),
        ({}, {"eos_token": {"content": "</s>"}}, "</s>"),
        ({"eos_token": None}, {}, None),
    ],
)
def test_eos_comes_from_the_files(tmp_path, config, special_map, expected):
    t = load(write(tmp_path, LIBRARY["byte_level"], tokenizer_config=config, special_tokens_map=special_map))
    assert t.eos_ids == (() if expected is None else (LIBRARY["byte_level"].token_to_id(expected),))


def test_an_eos_token_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"'<eot>' is not in .*tokenizer\.json"):
        load(write(tmp_path, LIBRARY["byte_level"], tokenizer_config={"eos_token": "<eot>"}))


@needs_data
def test_add_bos_token_means_what_it_means_to_transformers(tmp_path):
    """Beside a tokenizer.json it means nothing: the file's own post-processor decides."""
    transformers = pytest.importorskip("transformers")
    for post_processor in (True, False):
        for add_bos in (True, False):
            spec = json.loads((DATA / "checkpoints/stories260k/tokenizer.json").read_text("utf-8"))
            if not post_processor:
                spec["post_processor"] = None
            directory = tmp_path / f"{post_processor}{add_bos}"
            directory.mkdir()
            (directory / "tokenizer.json").write_text(json.dumps(spec))
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "add_bos_token": add_bos}
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
            reference = transformers.AutoTokenizer.from_pretrained(directory)
            assert load(directory).encode("hello") == reference.encode("hello")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "there is no"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "a JSON list"),
        (b"{}", "shape of a tokenizer.json"),
        (b'{"model": 3}', "shape"),
        (b'{"model": {"vocab": {}}}', "there must be some"),
        (b'{"model": {"vocab": {"a": 99999999999999}}}', "token ids"),
        (b'{"model": {"vocab": {"a": -1}}}', "token ids"),
        (b'{"model": {"vocab": {"a": true}}}', "token ids"),
        (b'{"model": {"type": "Nothing", "vocab": {"a": 0}}}', "tokenizers library refuses"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, named):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=named) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("nanovllm_tokenizers.files.MAX_FILE_BYTES", 1000)
    with pytest.raises(TokenizerError, match="larger than"):
        load(write(tmp_path, LIBRARY["byte_level"]))


def test_an_added_token_with_a_wrong_id_is_refused():
    spec = json.loads(LIBRARY["byte_level"].to_str())
    spec["added_tokens"][0]["id"] += 1000
    with pytest.raises(TokenizerError, match="added token"):
        HFTokenizer(spec, {}, None, "tokenizer.json")


def paths(value: object, path: tuple = ()) -> list[tuple]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, child in list(children)[:12] for p in paths(child, (*path, key)))]


SPECS = {kind: json.loads(library.to_str()) for kind, library in LIBRARY.items()}
PATHS = {kind: [p for p in paths(spec) if p] for kind, spec in SPECS.items()}
junk = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.lists(st.integers(0, 3), max_size=3), st.just("<s>"), st.just({"type": "Fuse"}), st.just({"type": "ByteLevel"}),
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=200)
@given(kinds, st.data())
def test_a_mutated_tokenizer_json_works_or_gives_a_typed_error(kind, data):
    spec = copy.deepcopy(SPECS[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(PATHS[kind]))
        try:
            target = spec
            for key in parents:
                target = target[key]
            if data.draw(st.booleans()):
                del target[last]
            else:
                target[last] = data.draw(junk)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier mutation took it away
    usable(json.dumps(spec))


@settings(deadline=None, max_examples=60)
@given(kinds, st.data())
def test_a_truncated_or_spliced_tokenizer_json_works_or_gives_a_typed_error(kind, data):
    text = LIBRARY[kind].to_str()
    a, b = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))
    usable(text[:a] + text[b:])


def usable(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "tokenizer.json"
        file.write_text(text, "utf-8")
        try:
            t = load(file)
            ids = t.encode("hello <s> wörld", parse_special=True) + t.encode("hello <s>")
        except TokenizerError as e:
            named = str(e)
        else:
            assert isinstance(t.decode(ids), str)
            return
        assert str(file) in named


# ------------------------------------------------------------------------------------------ plugin


def test_importing_the_package_is_light():
    code = "import nanovllm_tokenizers, sys; print({'tokenizers', 'jinja2', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
