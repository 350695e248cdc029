"""Which signatures are understood, where the shape of a past comes from, and what the refusals say."""

from __future__ import annotations

import json
import re
from typing import List, Optional, Tuple  # noqa: UP035 (TorchScript reads these)

import pytest

import foreign_torch
from foreign_torch import CONFIG, HEADS, HIDDEN, LAYERS, STYLES, VOCAB, Decoder, Flat, Pairs, make_runner, write
from nanovllm.errors import ConfigError, ModelError, UnsupportedModelError
from nanovllm_runner_torch.archive import torch_jit_warns_of_its_age
from nanovllm_runner_torch.foreign.signature import role_of
from nanovllm_runner_torch.options import TorchOptions

torch = foreign_torch.torch
Tensor = torch.Tensor

INFO = {
    "model_name": "Acme",
    "vocab_size": VOCAB,
    "eos_token_id": 3,
    "bos_token_id": None,
    "pad_token_id": -1,
    "hidden_size": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder().eval()


def scripted(path, module: torch.nn.Module):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with torch_jit_warns_of_its_age():
        torch.jit.save(torch.jit.script(module.eval()), path / "model.pt")
    return path


def exported(path, module: torch.nn.Module, *args: Tensor, dynamic=None):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    torch.export.save(torch.export.export(module.eval(), args, dynamic_shapes=dynamic), path / "model.pt2")
    return path


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("attention_mask", "mask"),
        ("mask", "mask"),
        ("position_ids", "positions"),
        ("positions", "positions"),
        ("past_key_values", "past"),
        ("past_key_values_0_key", "past"),
        ("past_1_value", "past"),
        ("past", "past"),
        ("kv_cache", "past"),
        ("cache_k", "past"),
        ("k_cache", "past"),
        ("keys", "past"),
        ("cache_position", None),
        ("use_cache", None),
        ("token_type_ids", None),
    ],
)
def test_names_of_what_follows_the_token_ids(name, role):
    assert role_of(name, is_first=False) == role


def test_the_first_argument_may_have_any_name_but_that_of_another_kind_of_model():
    assert role_of("x", is_first=True) == "ids"
    with pytest.raises(
        UnsupportedModelError, match=r"computes from embeddings.*'inputs_embeds'; understood is forward"
    ):
        role_of("inputs_embeds", is_first=True)
    with pytest.raises(UnsupportedModelError, match=r"recurrent states.*'past_ssm_state'"):
        role_of("past_ssm_state", is_first=False)


# ------------------------------------------------------------------------------------------- the shape of a past


@pytest.mark.parametrize("drop", [[], ["num_key_value_heads"], ["num_hidden_layers", "num_attention_heads"]])
def test_a_past_has_the_shape_that_config_json_says(drop, decoder, tmp_path):
    """Without the number of kv heads it is one that divides the heads; named tensors need no number of layers."""
    config = {key: value for key, value in CONFIG.items() if key not in drop} | {"head_dim": HIDDEN // HEADS}
    past = make_runner(write(tmp_path / "model", Flat, "trace", decoder, config))._keeper._decoder.past
    assert [p.past for p in past] == ["past_0_key", "past_0_value", "past_1_key", "past_1_value"]
    assert all((p.shape(3, 5), p.dtype) == ([3, 2, 5, 8], "float32") for p in past)


def test_or_that_model_info_json_says(decoder, tmp_path):
    """The seeds' file: it has no kv heads, and no length."""
    path = write(tmp_path / "model", Pairs, "script", decoder, None)
    (path / "model_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    runner = make_runner(path, max_model_len=40)
    assert (runner.info.description["model"], runner.info.max_model_len, runner.info.eos_ids) == ("Acme", 40, (3,))
    names = ["past_key_values[0][0]", "past_key_values[0][1]", "past_key_values[1][0]", "past_key_values[1][1]"]
    assert [p.past for p in runner._keeper._decoder.past] == names
    assert all(p.shape(3, 5) == [3, 5, 2, 8] for p in runner._keeper._decoder.past)
    with pytest.raises(ConfigError, match=r"no file of Acme says how long a sequence may be; set max_model_len"):
        make_runner(path)


@pytest.mark.parametrize("name", ["optional-script", "flat-export", "pairs-export"])
def test_some_models_show_the_shape_themselves(name, decoder, tmp_path):
    runner = make_runner(write(tmp_path / name, *STYLES[name], decoder, None), max_model_len=40)
    shape = [3, 5, 2, 8] if name.startswith("pairs") else [3, 2, 5, 8]
    assert [p.shape(3, 5) for p in runner._keeper._decoder.past] == [shape] * 4
    assert runner.info.description["past"] == "grown"


def test_a_shape_that_nothing_shows_is_asked_for_by_name(decoder, tmp_path):
    few = {"num_attention_heads": HEADS, "max_position_embeddings": 96}
    path = write(tmp_path / "pairs", Pairs, "script", decoder, few)
    with pytest.raises(
        ModelError, match=r"no file .* says how many layers .*, of which size \(head_dim, or hidden_size"
    ):
        make_runner(path)
    path = write(tmp_path / "flat", Flat, "trace", decoder, None)
    with pytest.raises(ModelError, match=r"how many heads .*of which size .*; put config.json or model_info.json"):
        make_runner(path, max_model_len=40)


def test_a_shape_that_does_not_fit_is_shown(decoder, tmp_path):
    path = write(tmp_path / "model", Flat, "trace", decoder, CONFIG | {"head_dim": 5})
    tried = r"pasts of shape \[1, 2, 0, 5\], \[1, 0, 2, 5\], \[1, 4, 0, 5\].*Expected size 5 but got size 8"
    with pytest.raises(UnsupportedModelError, match=tried):
        make_runner(path)


def test_a_number_that_no_model_has_is_refused_before_anything_is_tried(decoder, tmp_path):
    path = write(tmp_path / "model", Flat, "trace", decoder, CONFIG | {"num_attention_heads": 2**40})
    with pytest.raises(ModelError, match=r"num_attention_heads is 1099\d+; .* from 1 to 65536"):
        make_runner(path)


# ------------------------------------------------------------------------------------------- refusals


class Classifier(torch.nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features @ torch.ones([2, 3])


class TypeIds(torch.nn.Module):
    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        return input_ids + token_type_ids


class Numbers(torch.nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


class NoPresent(torch.nn.Module):
    def forward(self, input_ids: Tensor, past: List[Tuple[Tensor, Tensor]]) -> Tensor:  # noqa: UP006
        return torch.zeros([input_ids.shape[0], input_ids.shape[1], 125]) + past[0][0].sum()


class NoIds(torch.nn.Module):
    def forward(self, input_ids: Optional[int] = None) -> int:  # noqa: UP045
        return 1


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            Classifier(),
            r"is forward\(features: Tensor\), and cannot be run with token ids of shape \[1, 2\]: torch failed",
        ),
        (
            TypeIds(),
            r"forward\(input_ids: Tensor, token_type_ids: Tensor\), of which nobody here knows 'token_type_ids'",
        ),
        (Numbers(), r"answers a run of 1 x 2 tokens with int64 logits of shape \[1, 1, 2\]"),
        (NoPresent(), r"takes 4 tensors of a past and gives back 0"),
        (NoIds(), r"forward\(input_ids: Optional\[int\]\), which takes no token ids first"),
    ],
)
def test_another_signature_is_named_and_so_is_what_is_understood(module, reason, tmp_path):
    with pytest.raises(
        UnsupportedModelError, match=f"{reason}.*; understood is forward\\(input_ids\\[, attention_mask"
    ):
        make_runner(scripted(tmp_path / "model", module))


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.embed = torch.nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.embed(input_ids) + self.seen


def test_an_export_that_keeps_a_state_of_its_own_is_found_out(tmp_path):
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    path = exported(tmp_path / "model", Counting(), torch.ones(2, 3).long(), dynamic=dynamic)
    with pytest.raises(ModelError, match="another answer every time"):
        make_runner(path)


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: Tensor, extra: Tensor) -> Tensor:
        return self.embed(input_ids) + extra.sum()


class Past(torch.nn.Module):
    def forward(self, input_ids: Tensor, past_0: Tensor) -> tuple[Tensor, Tensor]:
        return input_ids[..., None] + past_0.sum(), past_0 + 1


def test_inputs_of_an_export_are_judged_by_what_it_says_of_them(tmp_path):
    ids, dynamic = torch.ones(2, 3).long(), torch.export.Dim.DYNAMIC
    with pytest.raises(UnsupportedModelError, match=r"an input 'extra', float32 \(2\), that nobody here knows"):
        make_runner(exported(tmp_path / "extra", Plain(), ids, torch.ones(2)))
    with pytest.raises(UnsupportedModelError, match=r"'input_ids', float32 \(2, 3\), where ids are understood as"):
        make_runner(exported(tmp_path / "float", Past(), torch.ones(2, 3), torch.ones(2)))
    sizes = ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic, 2: dynamic})
    past = exported(tmp_path / "past", Past(), ids, torch.ones(2, 5, 4, 8), dynamic=sizes)
    with pytest.raises(UnsupportedModelError, match=r"'past_0' is float32 \(\?, \?, \?, 8\); understood are float32"):
        make_runner(past)


def test_the_bounds_of_an_export_are_kept(decoder, tmp_path):
    sizes = {0: torch.export.Dim("batch", max=4), 1: torch.export.Dim("tokens", max=50)}
    path = exported(tmp_path / "model", foreign_torch.IdsOnly(decoder), torch.ones(2, 3).long(), dynamic=(sizes,))
    assert make_runner(path, max_num_seqs=4).info.max_model_len == 50
    with pytest.raises(ConfigError, match=r"max_num_seqs is 5, but .*model\.pt2 was exported for at most 4 sequences"):
        make_runner(path, max_num_seqs=5)
    with pytest.raises(ConfigError, match="max_model_len is 51, but model has 50 positions"):
        make_runner(path, max_num_seqs=4, max_model_len=51)


def test_an_export_of_fixed_lengths_is_refused(decoder, tmp_path):
    path = exported(tmp_path / "model", foreign_torch.IdsOnly(decoder), torch.ones(2, 3).long())
    with pytest.raises(
        ModelError, match=r"cannot compute a prompt of 9 tokens.*Guard failed.*; export it with dynamic"
    ):
        make_runner(path)


def test_logits_that_are_never_finite_are_refused(tmp_path):
    with pytest.raises(ModelError, match="logits are not finite"):
        make_runner(write(tmp_path / "nan", *STYLES["flat-script"], Decoder("NaN").eval()))


def test_what_was_not_asked_for_is_not_opened(decoder, tmp_path):
    path = write(tmp_path / "model", *STYLES["ids-only-script"], decoder)
    with pytest.raises(ConfigError, match=r"model\.pt is a TorchScript archive.*allow_code_in"):
        make_runner(path, options=TorchOptions(device="cpu"))


def test_options_that_do_not_apply(decoder, tmp_path):
    path = write(tmp_path / "model", *STYLES["ids-only-export"], decoder)
    options = {"device": "cpu", "allow_code_in": (path,)}
    with pytest.raises(ConfigError, match=r"runner.weights is 'int8', but model\.pt2 brings its own weights"):
        make_runner(path, options=TorchOptions(**options, weights="int8"))
    with pytest.raises(ConfigError, match=r"runner.dtype is 'bf16', but .*model\.pt2 was exported in float32"):
        make_runner(path, dtype="bf16")
    assert make_runner(path, dtype="fp32").info.description["dtype"] == "float32"


def test_files_that_contradict_the_model_are_refused(decoder, tmp_path):
    path = write(tmp_path / "model", *STYLES["ids-only-script"], decoder, CONFIG | {"vocab_size": 500})
    wanted = re.escape("vocab_size is 500; it must be 125, as the graph or another file says")
    with pytest.raises(ModelError, match=wanted):
        make_runner(path)
    path = write(tmp_path / "longer", *STYLES["ids-only-script"], decoder)
    with pytest.raises(ConfigError, match="max_model_len is 97, but longer has 96 positions"):
        make_runner(path, max_model_len=97)
