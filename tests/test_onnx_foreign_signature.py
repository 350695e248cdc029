"""What a graph's inputs and outputs mean, and what is said of graphs that are something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanovllm.errors import ModelError, UnsupportedModelError
from nanovllm_runner_onnx.foreign.signature import Signature, read_signature
from nanovllm_runner_onnx.genai_config import GenaiConfig
from nanovllm_runner_onnx.onnx_file import Header, Value
from support import DATA, needs_data

IDS = Value("input_ids", "int64", ("batch", "new"))
MASK = Value("attention_mask", "int64", ("batch", "total"))
POSITIONS = Value("position_ids", "int64", ("batch", "new"))
LOGITS = Value("logits", "float32", ("batch", "new", 61))
SHAPE = ("batch", 2, "past", 8)


def header(inputs: list[Value], outputs: list[Value]) -> Header:
    return Header(
        path=Path("g.onnx"), ir_version=9, opsets={"": 17}, producer="", metadata={}, ops=frozenset(),
        inputs=tuple(inputs), outputs=tuple(outputs), same_until=None, weight_bytes=0, data_files={},
    )  # fmt: skip


def pair(past: str, present: str, shape=SHAPE, longer=None, dtype="float32") -> tuple[Value, Value]:
    return Value(past, dtype, shape), Value(present, dtype, longer or shape)


def read(*pairs: tuple[Value, Value], more: list[Value] | None = None, genai=None) -> Signature:
    inputs = [IDS, MASK, POSITIONS, *(past for past, _ in pairs), *(more or [])]
    return read_signature(header(inputs, [LOGITS, *(present for _, present in pairs)]), genai)


def genai(tmp_path: Path, inputs: dict[str, str], outputs: dict[str, str], head_size: int | None = None) -> GenaiConfig:
    decoder = {"filename": "g.onnx", "inputs": inputs, "outputs": outputs, "head_size": head_size}
    path = tmp_path / "genai_config.json"
    path.write_text(json.dumps({"model": {"type": "llama", "decoder": decoder}}), encoding="utf-8")
    return GenaiConfig.read(path)


def test_a_past_is_paired_by_its_whole_name():
    """`past_key_values.0.value` holds the word key."""
    found = read(
        pair("past_key_values.0.value", "present.0.value"),
        pair("past_key_values.0.key", "present.0.key"),
        pair("past_key_values.11.key", "present.11.key"),
        pair("past_key_values.1.key", "present.1.key"),
    )
    for p in found.past:
        assert p.present == p.past.replace("past_key_values", "present")
        assert (p.batch_axis, p.time_axis, p.shape(3, 5), p.token_bytes) == (0, 2, [3, 2, 5, 8], 64)
    assert sum(p.token_bytes for p in found.past) == 4 * 64
    assert (found.mask, found.positions, found.use_cache) == (MASK, POSITIONS, None)


@pytest.mark.parametrize(
    ("past", "present"),
    [
        ("past_key_values.0.key", "present_key_values.0.key"),
        ("past_0_key", "present_0_key"),
        ("past.3.value", "present.3.value"),
    ],
)
def test_other_names_that_are_used(past, present):
    [found] = read(pair(past, present)).past
    assert (found.past, found.present) == (past, present)


def test_keys_and_values_in_one_tensor():
    [found] = read(pair("past_0", "present_0", (2, "batch", 4, "past", 8), (2, "batch", 4, "total", 8))).past
    assert (found.batch_axis, found.time_axis, found.shape(3, 5), found.token_bytes) == (1, 3, [2, 3, 4, 5, 8], 256)


def test_transposed_keys_have_their_tokens_in_the_last_axis():
    [found] = read(pair("past_key_values.0.key", "present.0.key", ("batch", 2, 8, "past"))).past
    assert (found.time_axis, found.shape(3, 5)) == (3, [3, 2, 8, 5])


def test_names_and_head_size_of_a_genai_config(tmp_path):
    config = genai(
        tmp_path,
        {"input_ids": "tokens", "past_key_names": "cache_k%d", "past_value_names": "cache_v%d"},
        {"logits": "scores", "present_key_names": "k%d_out", "present_value_names": "v%d_out"},
        head_size=8,
    )
    pairs = [pair(f"cache_{x}{i}", f"{x}{i}_out", ("batch", 2, "past", "size")) for i in (0, 12) for x in "vk"]
    tokens, scores = Value("tokens", "int32", ("b", "s")), Value("scores", "float32", ("b", "s", 9))
    graph = header([tokens, *(a for a, _ in pairs)], [scores, *(b for _, b in pairs)])
    found = read_signature(graph, config)
    assert (found.ids, found.logits, found.mask) == (tokens, scores, None)
    assert [(p.past, p.present) for p in found.past] == [(a.name, b.name) for a, b in pairs]
    assert all(p.shape(1, 3) == [1, 2, 3, 8] for p in found.past)
    with pytest.raises(UnsupportedModelError, match=r"has an input .tokens., int32 .* that nobody here knows"):
        read_signature(graph, None)


def test_a_merged_graph_has_a_switch():
    switch = Value("use_cache_branch", "bool", (1,))
    assert read(pair("past_key_values.0.key", "present.0.key"), more=[switch]).use_cache == "use_cache_branch"
    with pytest.raises(ModelError, match="'use_cache_branch' is no switch"):
        read(more=[switch])


def test_presents_without_a_past_are_not_needed():
    """optimum's decoder_model.onnx beside decoder_with_past_model.onnx."""
    present = Value("present.0.key", "float32", SHAPE)
    assert read_signature(header([IDS, MASK], [LOGITS, present]), None).past == ()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Value("inputs_embeds", "float32", ("b", "s", 8)), r"computes from embeddings.*'inputs_embeds'"),
        (Value("pixel_values", "float32", ("b", 3, 224, 224)), r"wants images.*'pixel_values'"),
        (Value("past_conv.0", "float32", ("b", 32, 4)), r"states of convolutions.*'past_conv.0'"),
        (Value("encoder_hidden_states", "float32", ("b", "s", 8)), r"half of an encoder-decoder.*'encoder_hidden"),
        (Value("past_key_values.0.ssm_state", "float32", ("b", 2, 4, 8)), r"recurrent states.*'past_key_values.0.ssm"),
        (Value("block_table", "int32", ("b", "n")), "paged graph of another engine.*'block_table'"),
        (Value("temperature", "float32", (1,)), r"input 'temperature', float32 \(1\), that nobody here knows"),
        (Value("past_length", "int64", ()), r"input 'past_length', int64 \(\), that nobody"),
    ],
)
def test_inputs_of_other_kinds_of_models_are_named(value, reason):
    with pytest.raises(UnsupportedModelError, match=reason + r".*; export the text decoder with token ids"):
        read(pair("past_key_values.0.key", "present.0.key"), more=[value])


@pytest.mark.parametrize(
    ("pairs", "error", "reason"),
    [
        ([pair("past_key_values.0.key", "new.0.key")], ModelError,
         "'past_key_values.0.key' has no output that continues it; 'present.0.key' or 'present_key_values.0.key'"),
        ([pair("past_key_values.0.key", "present.0.key", SHAPE, ("b", 4, "t", 8))], ModelError,
         r"'past_key_values.0.key' is float32 \(batch, 2, past, 8\), but 'present.0.key'.*\(b, 4, t, 8\)"),
        ([pair("past_key_values.0.key", "present.0.key", ("b", "heads", "past", 8))], UnsupportedModelError,
         r"\(b, heads, past, 8\); understood are .* exactly one size.*; export it with dynamic lengths"),
        ([pair("past_key_values.0.key", "present.0.key", (1, 2, 64, 8))], UnsupportedModelError,
         r"\(1, 2, 64, 8\); understood"),
        ([pair("past_key_values.0.key", "present.0.key", ("b", 2**62, "past", 8))], ModelError,
         r"a token takes 147,573,952,589,676,412,928 bytes in 'past_key_values.0.key'"),
        ([pair("past_key_values.0.key", "present.0.key", ("b", 0, "past", 8))], ModelError, "a token takes 0 bytes"),
        ([pair("past_key_values.0.key", "present.0.key", dtype="bfloat16")], UnsupportedModelError, "is bfloat16"),
        ([pair("past_key_values.0.key", "present.0.key", ("b", "past", 16))], UnsupportedModelError, "nobody here"),
    ],
)  # fmt: skip
def test_pasts_that_cannot_be_kept(pairs, error, reason):
    with pytest.raises(error, match=reason):
        read(*pairs)


def test_two_pasts_do_not_share_a_present(tmp_path):
    names = {"past_key_names": "k.%d", "past_value_names": "v.%d"}, {
        "present_key_names": "new.%d", "present_value_names": "new.%d"
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"'v\.0' has no output that continues it"):
        read(pair("k.0", "new.0"), pair("v.0", "x.0"), genai=genai(tmp_path, *names))


@pytest.mark.parametrize("dtype", ["string", "uint4", "undefined"])
def test_a_number_of_logits_is_a_number(dtype):
    with pytest.raises(ModelError, match=f"'num_logits_to_keep' is {dtype}, no number of tokens"):
        read(more=[Value("num_logits_to_keep", dtype, ())])


def test_a_present_that_continues_nothing():
    one = pair("past_key_values.0.key", "present.0.key")
    graph = header([IDS, one[0]], [LOGITS, one[1], Value("present.1.key", "float32", SHAPE)])
    with pytest.raises(ModelError, match=r"'present\.1\.key' continues no input"):
        read_signature(graph, None)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ([MASK], [LOGITS], "has no input 'input_ids'; it has 'attention_mask'"),
        ([IDS], [Value("last_hidden_state", "float32", ("b", "s", 8))], "no output 'logits'.*'last_hidden_state'"),
        ([IDS], [Value("logits", "int8", ("b", "s", 8))], "no output 'logits' of type float32"),
        ([Value("input_ids", "float32", ("b", "s"))], [LOGITS], r"'input_ids' is float32 \(b, s\)"),
        ([IDS, Value("attention_mask", "float32", ("b", "t"))], [LOGITS], "'attention_mask' is float32"),
        ([IDS, Value("attention_mask", "int64", ("b", 1, "s", "t"))], [LOGITS], r"'attention_mask' is int64 \(b, 1"),
        ([IDS, Value("position_ids", "int64", (3, "b", "s"))], [LOGITS], r"'position_ids' is int64 \(3, b, s\)"),
    ],
)
def test_what_every_decoder_must_have(inputs, outputs, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        read_signature(header(inputs, outputs), None)


@needs_data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("engine-synthetic-paged/decoder.onnx", "'cumulative_sequence_lengths'|'block_table'"),
        ("phi3-v-dummy-text/dummy_text.onnx", "computes from embeddings"),
        ("tiny-random-lfm2-fp32/decoder.onnx", "states of convolutions"),
        ("tiny-qwen35-cuda/decoder.onnx", None),
        ("tiny-random-gpt2-fp32/past.onnx", None),
        ("engine-dummy-decoder/decoder.onnx", None),
    ],
)
def test_published_graphs(name, reason):
    """Inputs and outputs of the graphs of onnxruntime-genai's own tests, as recorded."""
    io = json.loads((DATA / "onnx" / "io.json").read_text(encoding="utf-8"))[name]
    graph = header(*([Value(n, dtype, tuple(shape)) for n, dtype, shape in io[key]] for key in ("inputs", "outputs")))
    if reason is not None:
        with pytest.raises(UnsupportedModelError, match=reason):
            read_signature(graph, None)
        return
    found = read_signature(graph, None)
    assert len(found.past) == sum("past" in n for n, *_ in io["inputs"])
    assert found.ids.dtype == "int32"
