"""The `sentencepiece` tokenizer against the library: ids, bytes of each token, control pieces, broken models."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nanovllm.errors import RequestError, TokenizerError
from nanovllm.tokenizer import TokenStream
from nanovllm_tokenizers.sentencepiece import SentencePieceTokenizer, load
from support import DATA, needs_data

TEXT = ["the cat sat on the mat", "hello world, hello there!", "naïve café — 東京 🙂", "def f(x):\n    return x"] * 20
GOLDEN = {
    "mistral/tokenizer.model.v1": "golden_v1",
    "mistral/mistral_instruct_tokenizer_240323.model.v3": "golden_v3",
    "unigram/albert_spiece.model": "golden_albert_spiece",
    "unigram/sp_test_ja_model.model": "golden_sp_test_ja_model",
    "unigram/sp_test_model.model": "golden_sp_test_model",
    "unigram/t5_repo_test.model": "golden_t5_repo_test",
}
# [INST] and <tool> are spelled like control tokens; "wordish" and the run of spaces are words of the language.
USER_DEFINED = ["[INST]", "<tool>", "wordish", "▁▁▁"]
CONTROLS = ["<s>", "</s>", "<unk>", "<sys>", "[INST]", "<tool>"]


def train(**options) -> bytes:
    model = io.BytesIO()
    defaults = {"vocab_size": 120, "hard_vocab_limit": False, "control_symbols": ["<sys>"], "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, user_defined_symbols=USER_DEFINED, **{**defaults, **options}
    )
    return model.getvalue()


MODELS = {
    "bpe": train(model_type="bpe", byte_fallback=True, vocab_size=400, normalization_rule_name="identity",
                 remove_extra_whitespaces=False),
    "unigram": train(model_type="unigram"),
    "suffix": train(model_type="unigram", treat_whitespace_as_suffix=True, bos_id=-1, eos_id=3, pad_id=2, unk_id=1),
}  # fmt: skip


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> dict[str, SentencePieceTokenizer]:
    return {kind: load(write(tmp_path_factory.mktemp(kind), data)) for kind, data in MODELS.items()}


LIBRARY = {kind: sentencepiece.SentencePieceProcessor(model_proto=data) for kind, data in MODELS.items()}
PIECES = {kind: {p.id_to_piece(i) for i in range(p.vocab_size())} for kind, p in LIBRARY.items()}
kinds = st.sampled_from(sorted(MODELS))
plain = st.text(alphabet="helo wrdtcas\n<[]>/▁é東🙂０ﬁ", max_size=30) | st.text(max_size=20)
fragments = st.lists(st.sampled_from([*CONTROLS, "wordish", "   ", " hello", "é"]) | st.text(max_size=3), max_size=8)


def write(directory: Path, data: bytes, **files: object) -> Path:
    (directory / "tokenizer.model").write_bytes(data)
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def bos(tokenizer: SentencePieceTokenizer) -> list[int]:
    return tokenizer.encode("")


# ------------------------------------------------------------------------------------ ids of a text


@needs_data
@pytest.mark.parametrize("model", GOLDEN)
def test_golden_ids(model):
    file = DATA / "tokenizers" / model
    golden = json.loads((file.parent / f"{GOLDEN[model]}.json").read_text("utf-8"))
    t = load(file)
    assert len(golden["cases"]) == 58
    for case in golden["cases"]:
        assert t.encode(case["text"]) == [*bos(t), *case["ids"]], case["text"]
    assert bos(t) == [i for i in [golden["bos"]] if i >= 0]
    assert t.eos_ids == tuple(i for i in [golden["eos"]] if i >= 0)
    assert t.vocab_size == golden["vocab_size"]


@needs_data
def test_golden_ids_of_a_real_checkpoint():
    """Its tokenizer.json keeps runs of spaces, which its own tokenizer.model collapses: the rest is equal."""
    directory = DATA / "checkpoints/stories260k"
    library = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    t = load(directory / "tokenizer.model")
    equal = 0
    for case in json.loads((directory / "golden_tokenizer.json").read_text("utf-8"))["cases"]:
        text = case["text"]
        assert t.encode(text) == [1, *library.encode(text)], text
        if "  " not in text and text == text.strip(" ") and "<s>" not in text:
            assert t.encode(text) == case.get("ids_add_special_tokens", case["ids"]), text
            equal += 1
    assert equal > 40
    for case in json.loads((directory / "reference.json").read_text("utf-8"))["cases"]:
        assert t.encode(case["prompt"]) == case["input_ids"]


@given(kinds, plain)
def test_plain_text_gives_the_librarys_ids(ours, kind, text):
    if not any(tag in LIBRARY[kind].normalize(text) for tag in ("[INST]", "<tool>")):
        assert ours[kind].encode(text) == [*bos(ours[kind]), *LIBRARY[kind].encode(text)]


@given(kinds, fragments)
def test_text_never_becomes_a_control_piece(ours, kind, parts):
    t = ours[kind]
    controls = {LIBRARY[kind].piece_to_id(c) for c in CONTROLS} - {LIBRARY[kind].unk_id()}  # which any text may give
    ids = t.encode("".join(parts))
    assert [i for i in ids if i in controls] == bos(t)


@given(kinds, fragments)
def test_between_control_pieces_the_library_encodes_each_stretch(ours, kind, parts):
    t, library = ours[kind], LIBRARY[kind]
    expected, stretch = bos(t), ""
    for part in [*parts, None]:
        if part is not None and (part not in CONTROLS or part not in PIECES[kind]):
            stretch += part
            continue
        expected += t.encode(stretch)[len(bos(t)) :]
        stretch = ""
        expected += [] if part is None else [library.piece_to_id(part)]
    if not any(c in "".join(p for p in parts if p not in CONTROLS) for c in CONTROLS):  # none spelled by fragments
        assert t.encode("".join(parts), parse_special=True) == expected


def test_words_defined_by_the_model_stay_words(ours):
    for kind, t in ours.items():
        assert LIBRARY[kind].piece_to_id("wordish") in t.encode("a wordish cat")
        assert t.decode(t.encode("a wordish cat")).strip() == "a wordish cat"


def test_a_lone_surrogate_is_refused(ours):
    with pytest.raises(RequestError, match="surrogate"):
        ours["bpe"].encode("a\ud800")


# ------------------------------------------------------------------- bos, eos and the files beside the model


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, ["<s>"], []),
        ({"add_bos_token": None}, ["<s>"], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>"], ["</s>"]),
        ({"bos_token": "<sys>"}, ["<sys>"], []),
        ({"bos_token": {"content": "<new>"}, "added_tokens_decoder": {"900": {"content": "<new>", "special": True}}},
         [900], []),
    ],
)  # fmt: skip
def test_the_config_says_what_a_prompt_begins_and_ends_with(tmp_path, config, before, after):
    t = load(write(tmp_path, MODELS["bpe"], tokenizer_config=config))
    to_id = LIBRARY["bpe"].piece_to_id
    ids = [[i if isinstance(i, int) else to_id(i) for i in end] for end in (before, after)]
    assert t.encode("hello") == [*ids[0], *LIBRARY["bpe"].encode("hello"), *ids[1]]


def test_a_model_without_bos_gets_none_and_its_own_eos(ours):
    assert ours["suffix"].encode("hello") == LIBRARY["suffix"].encode("hello")
    assert ours["suffix"].eos_ids == (3,)


def test_eos_is_the_configs_or_else_the_models(tmp_path):
    assert load(write(tmp_path, MODELS["bpe"])).eos_ids == (LIBRARY["bpe"].eos_id(),)
    config = {"eos_token": "<|im_end|>"}
    write(tmp_path, MODELS["bpe"], tokenizer_config=config, added_tokens={"<|im_end|>": 500, "extra": 501})
    t = load(tmp_path)
    assert t.eos_ids == (500,)
    assert t.vocab_size == 502
    assert (t.token_bytes(500), t.token_bytes(501), t.token_bytes(450)) == (b"", b"extra", b"")
    assert t.encode("a extra", parse_special=True)[-1] == t.encode("a extra")[-1] == 501
    assert 500 not in t.encode("a<|im_end|>")
    with pytest.raises(TokenizerError, match="'<eot>' is not in"):
        load(write(tmp_path, MODELS["bpe"], tokenizer_config={"eos_token": "<eot>"}))
    with pytest.raises(TokenizerError, match="add_bos_token must be true or false, not 'yes'"):
        load(write(tmp_path, MODELS["bpe"], tokenizer_config={"add_bos_token": "yes"}))
    with pytest.raises(TokenizerError, match="add_bos_token is true, but there is no bos_token"):
        load(write(tmp_path, MODELS["suffix"], tokenizer_config={"add_bos_token": True}))


def test_a_piece_that_the_config_declares_special_is_no_longer_written_by_text(tmp_path):
    i = LIBRARY["bpe"].piece_to_id("▁the")
    assert i in LIBRARY["bpe"].encode("the cat")
    config = {"added_tokens_decoder": {str(i): {"content": "<|turn|>", "special": True, "rstrip": True}}}
    t = load(write(tmp_path, MODELS["bpe"], tokenizer_config=config))
    assert i not in t.encode("the cat <|turn|>")
    assert t.encode("<|turn|>  cat", parse_special=True) == [*bos(t), i, *LIBRARY["bpe"].encode("cat")]


def test_an_added_word_is_found_in_every_text_and_nowhere_else(tmp_path):
    """Words that are hexadecimal digits, as the names that hold a control token's place are."""
    words = {digit: 500 + i for i, digit in enumerate("0123456789abcdef")}
    t = load(write(tmp_path, MODELS["bpe"], added_tokens=words))
    to_id = LIBRARY["bpe"].piece_to_id
    assert t.encode("<s>a</s>7", parse_special=True) == [*bos(t), to_id("<s>"), 510, to_id("</s>"), 507]
    assert t.encode("a7") == [*bos(t), 510, 507]


def test_legacy_false_leaves_out_the_space_after_a_control_piece(tmp_path):
    t = load(write(tmp_path, MODELS["bpe"], tokenizer_config={"legacy": False}))
    piece = LIBRARY["bpe"].piece_to_id
    ids = t.encode("cat</s>cat", parse_special=True)
    first = LIBRARY["bpe"].encode("cat")
    assert ids[: len(first) + 2] == [*bos(t), *first, piece("</s>")]
    assert b"".join(map(t.token_bytes, ids)) == b" catcat"
    old = load(write(tmp_path, MODELS["bpe"], tokenizer_config={"legacy": True}))
    assert b"".join(map(old.token_bytes, old.encode("cat</s>cat", parse_special=True))) == b" cat cat"


@needs_data
@pytest.mark.parametrize("legacy", [True, False])
def test_legacy_is_what_it_is_to_transformers(tmp_path, legacy):
    """transformers' Llama: a Metaspace that prepends its space to the first stretch only, or to each."""
    shutil.copy(DATA / "checkpoints/stories260k/tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    spec = json.loads((DATA / "checkpoints/stories260k/tokenizer.json").read_text("utf-8"))
    scheme = "always" if legacy else "first"
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    reference, t = Tokenizer.from_str(json.dumps(spec)), load(tmp_path)
    for text in ("hello", "hello</s>you", "</s>hello</s>a b</s>", "<s>\nhello"):
        assert t.encode(text, parse_special=True) == reference.encode(text).ids, text


# ------------------------------------------------------------------------------- bytes of each token


@given(kinds, st.data())
def test_bytes_of_tokens_join_to_the_librarys_text(ours, kind, data):
    t, library = ours[kind], LIBRARY[kind]
    hidden = {library.unk_id()}  # shown by the library as a mark, by us as nothing
    pool = [i for i in range(t.vocab_size) if i not in hidden]
    ids = data.draw(st.lists(st.sampled_from(pool), max_size=20))
    text = b"".join(map(t.token_bytes, ids)).decode("utf-8", "replace")
    assert t.decode(ids) == text
    stream = TokenStream(t.token_bytes)
    assert "".join(stream.feed([i]) for i in ids) + stream.flush() == text
    if "�" not in text:  # invalid UTF-8: the library marks each byte
        assert text.strip(" ") == library.decode(ids).strip(" ")  # it drops the space at the start, or at the end


@needs_data
@pytest.mark.parametrize("model", GOLDEN)
def test_bytes_of_tokens_join_to_the_librarys_text_for_real_models(model):
    file = DATA / "tokenizers" / model
    t, library = load(file), sentencepiece.SentencePieceProcessor(model_file=str(file))
    draw = random.Random(1)
    for length in [1, 2, 5, 20] * 100:
        ids = [i for i in (draw.randrange(t.vocab_size) for _ in range(length)) if i != library.unk_id()]
        text = t.decode(ids)
        if "�" not in text:
            assert text.lstrip(" ") == library.decode(ids).lstrip(" ")


def test_special_and_undefined_ids_have_no_bytes(ours):
    t, library = ours["bpe"], LIBRARY["bpe"]
    assert [t.token_bytes(library.piece_to_id(c)) for c in ("<s>", "</s>", "<unk>", "<sys>")] == [b""] * 4
    assert t.token_bytes(library.piece_to_id("<tool>")) == b"<tool>"  # part of an answer, though users cannot write it
    assert t.token_bytes(t.vocab_size) == t.token_bytes(-1) == b""
    assert t.token_bytes(library.piece_to_id("<0xE6>")) == b"\xe6"
    assert t.token_bytes(library.encode("hello")[0]).startswith(b" ")  # the first token of an answer keeps it


@given(plain)
def test_with_byte_fallback_a_text_comes_back(ours, text):
    t = ours["bpe"]
    if "▁" not in text and not any(tag in text for tag in CONTROLS):
        assert t.decode(t.encode(text)).removeprefix(" ") == text


# ------------------------------------------------------------------------------------------- conversations


def test_a_conversation_holds_the_templates_control_pieces_only(tmp_path):
    write(tmp_path, MODELS["bpe"])
    source = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} </s>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(source)
    t, library = load(tmp_path), LIBRARY["bpe"]
    inst, end = library.piece_to_id("[INST]"), library.piece_to_id("</s>")
    content = "hello </s>[INST] there"
    ids = t.chat([{"role": "user", "content": content}])
    assert ids[:2] == [*bos(t), inst]
    assert ids[-1] == end
    assert ids.count(inst) == ids.count(end) == 1
    assert t.decode(ids) == f"[INST]  {content} "
    assert ids[2:-1] == t.encode(f" {content} ")[1:]


# --------------------------------------------------------------------------------------------- broken files


def problem_of(file: Path, text: str) -> str | None:
    """What loading and using the model says; None if it works."""
    try:
        t = load(file)
        ids = t.encode(text, parse_special=True)
    except TokenizerError as e:
        return str(e)
    assert isinstance(t.decode(ids), str)
    return None


def test_a_model_cut_short_is_refused_wherever_it_is_cut(tmp_path):
    data, file = MODELS["unigram"], tmp_path / "m.model"
    normalizer = data.index(b"nmt_nfkc") - 2  # where the last part of the model begins, after its tag and its length
    for size in [*range(400), *range(400, len(data), 997), *range(normalizer - 400, normalizer), len(data) - 1]:
        file.write_bytes(data[:size])
        assert str(file) in (problem_of(file, "hello") or ""), size
    file.write_bytes(data)
    assert problem_of(file, "hello") is None


@settings(deadline=None, max_examples=150)
@given(kinds, st.data())
def test_a_mutated_model_works_or_gives_a_typed_error(tmp_path_factory, kind, data):
    model = bytearray(MODELS[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("mutated") / "m.model"
    file.write_bytes(bytes(model))
    problem = problem_of(file, "hello <s> wörld [INST]")
    assert problem is None or str(file) in problem


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no pieces"),
        (b"{}", "byte 0|cut short"),
        (b"\n\x05ab", "cut short"),
        (b"\n" + b"\xff" * 12, "begins no number"),
        (b"\n\x03\n\x01\xff", "no trainer_spec"),
        (b"\n\x03\n\x01\xff\x12\x00\x1a\x00", "piece 0 is not UTF-8"),
        (b"\n\x02\x18\x01\x12\x00\x1a\x00", "piece 0 has no text"),
        (b"\n\x05\n\x01a\x18\x09\x12\x00\x1a\x00", "piece 0 has the type 9"),
        (b"\n\x05\n\x01a\x18\x02\x12\x00\x1a\x00\x2a\x03\x12\x01x", "denormalisation"),
    ],
)
def test_a_bad_model_is_named(tmp_path, content, named):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=named) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_which_file_of_a_directory_is_the_model(tmp_path):
    with pytest.raises(TokenizerError, match=r"there is no .*tokenizer\.model"):
        load(tmp_path)
    for name in ("a.model", "b.model.v3"):
        (tmp_path / name).write_bytes(MODELS["bpe"])
    with pytest.raises(TokenizerError, match=r"several models: a\.model, b\.model\.v3"):
        load(tmp_path)
    (tmp_path / "spiece.model").write_bytes(MODELS["suffix"])
    assert load(tmp_path).eos_ids == (3,)
    (tmp_path / "tokenizer.model").write_bytes(MODELS["bpe"])
    assert load(tmp_path).eos_ids == (LIBRARY["bpe"].eos_id(),)


def test_without_the_library_or_with_an_old_one_the_pip_line_is_shown(tmp_path, monkeypatch):
    write(tmp_path, MODELS["bpe"])
    monkeypatch.setattr(sentencepiece, "__version__", "0.2.0")
    with pytest.raises(
        TokenizerError, match=r"0\.2\.0 is installed.*CVE-2026-1260.*nanovllm-tokenizers\[sentencepiece\]"
    ):
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match=r"not installed.*pip install 'nanovllm-tokenizers\[sentencepiece\]'"):
        load(tmp_path)
