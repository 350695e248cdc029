"""FamilyConformance: families of ours pass it, and every broken one is caught by its test."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from conformance_support import MADE, failed, of, results
from model_cases import MODELS
from nanovllm.testing import FamilyConformance
from nanovllm_models import checkpoint
from nanovllm_models.config import Config
from nanovllm_models.families import llama
from nanovllm_models.registry import Family
from nanovllm_models.spec import DecoderSpec
from support import REPO

LLAMA = {"model_type": "llama", **MODELS["llama"][2], "rms_norm_eps": 0.001}
TIED = LLAMA | {"tie_word_embeddings": True}


def config_of(name: str) -> dict[str, Any]:
    model_type, _, config = MODELS[name]
    return {"model_type": model_type, **config}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2-tied-window", "granitemoe"])
def test_a_family_of_ours_passes_everything(name: str) -> None:
    pytest.importorskip("transformers")
    config = config_of(name)
    found = results(FamilyConformance, config, MADE)
    assert not failed(found)
    skipped = {r.name: r.reason for r in found.values() if r.outcome == "skipped"}
    tied = {} if name in ("gpt2", "gemma2", "qwen2-tied-window") else {"test_tied_embeddings"}
    assert skipped.keys() == set(tied)


class TestQwen3Moe(FamilyConformance):
    """An expected failure, with its reason; all else as it must be."""

    expected_failures = {  # noqa: RUF012 (a mapping that nobody changes)
        "test_every_key_of_the_config_matters": "intermediate_size is of dense layers, and this config has none"
    }

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        pytest.importorskip("transformers")
        return config_of("qwen3_moe")


# -------------------------------------------------------------------------------------- broken ones


def family(**members: Any) -> Family:
    """Llama's, with other members."""
    names = ("PREFIX", "LAYOUT", "TRANSPOSED", "GROUPED", "IGNORED", "spec")
    return SimpleNamespace(**{name: getattr(llama, name) for name in names} | members)  # type: ignore[return-value]


def layout(**modules: Any) -> Any:
    """Llama's, with other places; None: without that module."""
    own = {k.rpartition(".")[2]: k for k in llama.LAYOUT}
    changed = {own[name]: place for name, place in modules.items()}
    return {k: v for k, v in {**llama.LAYOUT, **changed}.items() if v is not None}


def spec_with(change: Callable[[DecoderSpec], Any]) -> Callable[[Config], Any]:
    return lambda config: change(llama.spec(config))


def attention(spec: DecoderSpec, **changes: Any) -> DecoderSpec:
    return replace(spec, attention=replace(spec.attention, **changes))


def reads_carelessly(config: Config) -> DecoderSpec:
    hidden = int(config.get("hidden_size"))
    return replace(llama.spec(config), hidden_size=hidden)


def reads_everything(config: Config) -> DecoderSpec:
    for key in config._values:
        config.get(key)
    return llama.spec(config)


def forgets_epsilon(config: Config) -> DecoderSpec:
    spec = llama.spec(config)
    return replace(spec, norm=replace(spec.norm, eps=1e-5))


def believes_any_activation(config: Config) -> DecoderSpec:
    copied = copy(config)
    copied._values = dict(config._values) | {"hidden_act": "silu"}
    config.get("hidden_act")
    spec = llama.spec(copied)
    config._read |= copied._read
    return spec


def changes_the_config(config: Config) -> DecoderSpec:
    spec = llama.spec(config)
    config._values["num_key_value_heads"] = 1  # type: ignore[index]
    return spec


# What is wrong: (the family, its config, the test that says so).
BROKEN: dict[str, tuple[Family, dict[str, Any], str]] = {
    "prefix of other files": (family(PREFIX="transformer."), LLAMA, "test_the_module_has_every_member"),
    "gate and up exchanged": (
        family(LAYOUT=layout(gate_proj="layers.{i}.mlp.up", up_proj="layers.{i}.mlp.gate")),
        LLAMA,
        "test_the_logits_are_those_of_transformers",
    ),
    "no place for a weight": (family(LAYOUT=layout(up_proj=None)), LLAMA, "test_every_weight_has_one_place"),
    "one weight in two places": (
        family(LAYOUT=layout(up_proj=("layers.{i}.mlp.up", "layers.{i}.mlp.gate"))),
        LLAMA,
        "test_every_weight_has_one_place",
    ),
    "transposed": (
        family(TRANSPOSED=frozenset({"model.layers.{i}.self_attn.o_proj"})),
        LLAMA,
        "test_the_logits_are_those_of_transformers",
    ),
    "transposes a stranger": (family(TRANSPOSED=frozenset({"o_proj"})), LLAMA, "test_the_module_has_every_member"),
    "a list of members": (family(GROUPED=[]), LLAMA, "test_the_module_has_every_member"),
    "ignores any tensor": (family(IGNORED=".*"), LLAMA, "test_tensors_that_do_not_belong_are_refused_by_name"),
    "no regular expression": (family(IGNORED="("), LLAMA, "test_the_module_has_every_member"),
    "no head for tied files": (family(LAYOUT=layout(lm_head=None)), TIED, "test_tied_embeddings"),
    "spec of lists": (
        family(spec=spec_with(lambda s: attention(s, windows=list(s.attention.windows)))),
        LLAMA,
        "test_the_spec_is_complete",
    ),
    "a layer without window": (
        family(spec=spec_with(lambda s: attention(s, windows=s.attention.windows[:-1]))),
        LLAMA,
        "test_the_spec_is_complete",
    ),
    "another architecture": (
        family(spec=spec_with(lambda s: replace(s, architecture="mistral"))),
        LLAMA,
        "test_the_spec_is_complete",
    ),
    "no spec at all": (family(spec=spec_with(lambda s: None)), LLAMA, "test_the_config_is_read"),
    "a scale of its own": (
        family(spec=spec_with(lambda s: attention(s, scale=s.attention.scale * 1.1))),
        LLAMA,
        "test_the_logits_are_those_of_transformers",
    ),
    "an epsilon of its own": (family(spec=forgets_epsilon), LLAMA, "test_every_key_of_the_config_matters"),
    "int() of a value": (family(spec=reads_carelessly), LLAMA, "test_no_value_is_more_than_refused"),
    "reads unknown keys": (family(spec=reads_everything), LLAMA, "test_a_key_that_may_matter_is_refused_by_name"),
    "any activation": (
        family(spec=believes_any_activation),
        LLAMA | {"hidden_act": "silu"},
        "test_a_wrong_type_is_refused_by_name",
    ),
    "changes the config": (family(spec=changes_the_config), LLAMA, "test_reading_changes_nothing"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_caught_by_its_test(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, config, test = BROKEN[what]
    if "transformers" in test:
        pytest.importorskip("transformers")
    monkeypatch.setattr(checkpoint, "find_family", lambda model_type: broken)
    found = of(FamilyConformance, lambda: broken, config, test)
    assert found[test].outcome == "failed", found[test].reason
    assert "\n" not in found[test].reason


def test_a_config_that_is_too_large_is_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that would need it is skipped."""
    found = results(FamilyConformance, LLAMA | {"vocab_size": 10**6}, MADE)
    assert list(failed(found)) == ["test_the_config_is_read"]
    assert re.match(
        r"config describes 96,\d+,\d+ parameters: take a small one", found["test_the_config_is_read"].reason
    )


def test_the_page_names_what_is_caught() -> None:
    page = (REPO / "docs" / "conformance.md").read_text("utf-8")
    assert {test for test in {test for _, _, test in BROKEN.values()} if f"`{test}`" not in page} == set()
