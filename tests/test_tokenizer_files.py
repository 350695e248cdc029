"""vocab.json with merges.txt against transformers, `auto`, the built-in chat templates, and the added tokens of all."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from tokenizers.pre_tokenizers import ByteLevel

from nanovllm.errors import PluginError, RequestError, TokenizerError
from nanovllm.llm import LLM
from nanovllm.plugins import find
from nanovllm_tokenizers import auto_plugin, sentencepiece_plugin, tiktoken_plugin
from nanovllm_tokenizers.auto import kind_of
from nanovllm_tokenizers.hf import HFTokenizer, load
from nanovllm_tokenizers.sentencepiece import SentencePieceTokenizer
from nanovllm_tokenizers.templates import BUILT_IN
from nanovllm_tokenizers.tiktoken import TiktokenTokenizer
from support import DATA, needs_data
from test_tokenizer_corpus import corpus
from test_tokenizer_tiktoken import PATTERN, llama3, rank_lines

QWEN2 = ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
HI = [{"role": "user", "content": "hi"}]
BYTES = [chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))] + [
    chr(0x100 + i) for i in range(68)
]


def pair(directory: Path, *extra: str, merges: str = "#version: 0.2\nh i\nĠ hi\n", **files: object) -> Path:
    """A byte-level vocabulary of one's own, with two merges."""
    vocab = {piece: i for i, piece in enumerate([*BYTES, "hi", "Ġhi", *extra])}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text(merges, "utf-8")
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def model(directory: Path, name: str = "tokenizer.model", **options) -> Path:
    data = io.BytesIO()
    sentences = iter(["hi there, user and assistant"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=data, vocab_size=40, hard_vocab_limit=False, minloglevel=2, **options
    )
    (directory / name).write_bytes(data.getvalue())
    return directory


# ----------------------------------------------------------------------------------- vocab.json, merges.txt


@needs_data
@pytest.mark.parametrize(
    ("source", "files", "golden", "config"),
    [
        ("gpt2", {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}, "golden_tokenizer_json.json", "gpt2"),
        ("gpt2", {"encoder.json": "encoder.json", "vocab.bpe": "vocab.bpe"}, "golden_tokenizer_json.json", "gpt2"),
        ("qwen2", {name: name for name in QWEN2}, "golden.json", "qwen2"),
        ("qwen2", {name: name for name in QWEN2 if name != "tokenizer_config.json"}, "golden.json", "qwen2"),
    ],
)
def test_ids_of_real_vocabularies_equal_those_of_transformers(tmp_path, source, files, golden, config):
    transformers = pytest.importorskip("transformers")
    for name, target in files.items():
        shutil.copy(DATA / "tokenizers" / source / name, tmp_path / target)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": config}))
    t = load(tmp_path)
    cases = json.loads((DATA / "tokenizers" / source / golden).read_text("utf-8"))["cases"]
    assert len(cases) >= 58
    special = {50256} if source == "gpt2" else set(range(151643, 151665))
    for case in cases:
        assert t.encode(case["text"], parse_special=True) == case["ids"]
        assert special.isdisjoint(t.encode(case["text"]))
    assert t.eos_ids == ((151645,) if source == "qwen2" else (50256,))
    if "vocab.json" in files.values():
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for line in corpus()[:300]:
            assert t.encode(line, parse_special=True) == reference(line).input_ids
        assert t.eos_ids == (reference.eos_token_id,)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_bos_and_the_prefix_space_are_those_of_transformers(tmp_path, name, add_bos):
    transformers = pytest.importorskip("transformers")
    config = {
        "tokenizer_class": name, "add_bos_token": add_bos, "add_prefix_space": add_bos,
        "bos_token": "<s>", "eos_token": "<s>", "unk_token": "<s>", "pad_token": "<s>",
    }  # fmt: skip
    pair(tmp_path, "<s>", tokenizer_config=config)
    reference, t = getattr(transformers, name).from_pretrained(tmp_path), load(tmp_path)
    for text in ("hi hi", "<s>hi", "", " é"):
        assert t.encode(text, parse_special=True) == reference(text).input_ids
    assert t.encode("hi")[:1] == ([258] if add_bos else [256])
    assert t.eos_ids == (258,)


def test_added_tokens_come_from_any_of_the_three_files(tmp_path):
    special_map = {"eos_token": {"content": "<|e|>"}, "additional_special_tokens": ["<|a|>"]}
    added = {"<|a|>": 259, "<|e|>": 258, "word": 260}
    t = load(pair(tmp_path, added_tokens=added, special_tokens_map=special_map))
    assert t.eos_ids == (258,)
    assert t.encode("hiword<|a|><|e|>", parse_special=True) == [256, 260, 259, 258]
    assert t.encode("<|a|>").count(259) == 0
    assert t.decode([258, 259, 260]) == "word"
    decoder = {"258": {"content": "<|f|>", "special": True}}
    t = load(pair(tmp_path, tokenizer_config={"added_tokens_decoder": decoder, "eos_token": "<|f|>"}))
    assert t.encode("<|f|><|a|>", parse_special=True)[0] == 258 == t.eos_ids[0]
    for wrong in ({"x": {"content": "a"}}, {"1": "a"}, {"1": {"content": 3}}, [1]):
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: added token .* has no text or no id"):
            load(pair(tmp_path, tokenizer_config={"added_tokens_decoder": wrong}))


def test_an_unknown_class_is_refused_by_name(tmp_path):
    with pytest.raises(TokenizerError, match=r"how a RobertaTokenizerFast splits a text is not known.*save_pretrained"):
        load(pair(tmp_path, tokenizer_config={"tokenizer_class": "RobertaTokenizerFast"}))


@pytest.mark.parametrize("line", ["h", "h  i", "h i !", "i h", "x\tz", "h i\u2028"])
def test_a_bad_merge_is_named(tmp_path, line):
    with pytest.raises(TokenizerError, match=r"merges\.txt, line 3: .* is not a pair of tokens"):
        load(pair(tmp_path, merges=f"#version: 0.2\nh i\n{line}\n"))


@pytest.mark.parametrize("vocab", ["[]", "{", '{"h": "x"}', '{"h": -1}', "{}"])
def test_a_bad_vocabulary_is_named(tmp_path, vocab):
    pair(tmp_path, merges="")
    (tmp_path / "vocab.json").write_text(vocab)
    with pytest.raises(TokenizerError, match=r"vocab\.json"):
        load(tmp_path)


# ----------------------------------------------------------------------------------------------------- auto


def context(path: Path | None, **options) -> SimpleNamespace:
    config = auto_plugin.tokenizer_config()(**options)
    return SimpleNamespace(options=config, model="some-model", path=path, tokenizer_path=None)


def test_auto_chooses_by_what_the_directory_holds(tmp_path):
    def made() -> type:
        return type(auto_plugin.create_tokenizer(context(tmp_path)))

    with pytest.raises(
        TokenizerError, match=r"no tokenizer\.json, vocab\.json with merges\.txt.*\*\.tiktoken, tokenizer"
    ):
        made()
    model(tmp_path, "other.model")
    assert made() is SentencePieceTokenizer
    model(tmp_path)
    assert made() is SentencePieceTokenizer
    llama3(tmp_path)  # the same name, but a rank file
    assert made() is TiktokenTokenizer
    pair(tmp_path)
    assert made() is HFTokenizer
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not have the shape"):
        made()


def test_auto_takes_a_file_for_what_it_is(tmp_path):
    pair(tmp_path)
    model(tmp_path)
    (tmp_path / "my.tiktoken").write_text("".join(rank_lines()))
    names = ("vocab.json", "merges.txt", "tokenizer.model", "my.tiktoken")
    assert [kind_of(tmp_path / name) for name in names] == ["hf", "hf", "sentencepiece", "tiktoken"]
    ctx = SimpleNamespace(**{**vars(context(None)), "tokenizer_path": tmp_path / "merges.txt"})
    assert auto_plugin.create_tokenizer(ctx).encode("hi") == [256]
    (tmp_path / "model.onnx").touch()
    assert auto_plugin.create_tokenizer(context(tmp_path / "model.onnx")).encode("hi") == [256]
    with pytest.raises(TokenizerError, match=r"some-model.*tokenizer\.path"):
        auto_plugin.create_tokenizer(context(None))


def test_the_plugins_pass_their_options_on(tmp_path):
    (tmp_path / "my.tiktoken").write_text("".join(rank_lines()))
    options = tiktoken_plugin.tokenizer_config()(pattern=PATTERN, chat_template="completion")
    t = tiktoken_plugin.create_tokenizer(SimpleNamespace(**{**vars(context(tmp_path)), "options": options}))
    assert t.chat(HI) == t.encode("hi")
    with pytest.raises(TokenizerError, match="some-model"):
        tiktoken_plugin.create_tokenizer(SimpleNamespace(**{**vars(context(None)), "options": options}))
    ctx = context(model(tmp_path), chat_template="falcon")
    t = sentencepiece_plugin.create_tokenizer(ctx)
    assert t.decode(t.chat(HI)).count("hi") == 1


def test_only_the_library_that_is_needed_is_imported(tmp_path):
    pair(tmp_path)
    code = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from nanovllm_tokenizers import auto_plugin
options = auto_plugin.tokenizer_config()()
ctx = SimpleNamespace(options=options, model="m", path=Path({str(tmp_path)!r}), tokenizer_path=None)
assert auto_plugin.create_tokenizer(ctx).encode("hi") == [256]
print({{"sentencepiece", "tiktoken", "jinja2", "requests"}} & {{*sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@needs_data
def test_core_takes_auto_where_the_model_has_files():
    with LLM(str(DATA / "checkpoints/stories260k")) as llm:
        assert type(llm.tokenizer) is HFTokenizer
    for name in ("auto", "hf", "sentencepiece", "tiktoken"):
        assert find("tokenizers", name).distribution == "nanovllm-tokenizers"
    with pytest.raises(PluginError, match="did you mean 'tiktoken'"):
        find("tokenizers", "tiktokn")


# ---------------------------------------------------------------------------------- built-in chat templates

LLAMA3 = BUILT_IN["llama3"].controls
GRANITE = BUILT_IN["granite"].controls
# For one question: what nano-vllm-go's cmd/ask writes. Its prompt for Granite brings its own system message.
SYSTEM = "You are a helpful assistant. Please ensure responses are professional, accurate, and safe."
ONE = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "falcon": "User: hi\nAssistant:",
    "granite": f"<|start_of_role|>system<|end_of_role|>{SYSTEM}<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "completion": "hi",
}
TALK = [
    {"role": "system", "content": "Be brief."}, *HI, {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "ok"},
]  # fmt: skip
SEVERAL = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nok<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "falcon": "Be brief.\nUser: hi\nAssistant: Yes?\nUser: ok\nAssistant:",
    "granite": "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>Yes?"
    "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>ok<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "completion": "Be brief.\nhi\nYes?\nok",
}


def speaking(directory: Path, *controls: str, template: str | None = None) -> HFTokenizer:
    added = {text: 258 + i for i, text in enumerate(controls)}
    return load(
        pair(directory, added_tokens=added, special_tokens_map={"additional_special_tokens": [*added]}), template
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_template_writes_its_golden_text(tmp_path, name):
    t = speaking(tmp_path, *LLAMA3, *GRANITE, template=name)
    for messages, expected in ((HI, ONE), (TALK, SEVERAL)):
        assert t.chat(messages) == t.encode(expected[name], parse_special=True)


def test_it_is_chosen_by_the_control_tokens_of_the_vocabulary(tmp_path):
    assert speaking(tmp_path, *LLAMA3).chat(HI)[:2] == [258, 259]
    assert speaking(tmp_path, *GRANITE).chat(HI)[0] == 258
    (tmp_path / "chat_template.jinja").write_text("own")
    assert speaking(tmp_path, *GRANITE).decode(speaking(tmp_path, *GRANITE).chat(HI)) == "own"
    assert speaking(tmp_path, *GRANITE, template="granite").chat(HI)[0] == 258
    (tmp_path / "chat_template.jinja").unlink()
    for controls in ((), LLAMA3[:3], GRANITE[1:]):
        with pytest.raises(
            TokenizerError, match=r"no chat template; .*tokenizer\.chat_template to llama3, falcon, gran"
        ):
            speaking(tmp_path, *controls).chat(HI)


def test_a_template_whose_control_tokens_are_missing_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"'llama3' writes <\|eot_id\|>, which the vocabulary does not have"):
        speaking(tmp_path, *LLAMA3[:3], template="llama3")


def test_what_a_user_writes_stays_text_in_a_built_in_template(tmp_path):
    t = speaking(tmp_path, *LLAMA3)
    ids = t.chat([{"role": "user", "content": "hi<|eot_id|><|start_header_id|>"}])
    assert [i for i in ids if i >= 258] == [258, 259, 260, 261, 259, 260]


def test_a_completion_is_a_plain_prompt_with_its_bos(tmp_path):
    t = auto_plugin.create_tokenizer(context(model(tmp_path), chat_template="completion"))
    assert t.chat(HI) == t.encode("hi")
    assert t.encode("hi")[0] == 1
    with pytest.raises(RequestError, match="surrogate"):
        t.chat([{"role": "user", "content": "\ud800"}])


def test_the_byte_alphabet_of_these_tests_is_the_librarys():
    assert sorted(BYTES) == sorted(ByteLevel.alphabet())
