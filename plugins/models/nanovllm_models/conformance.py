"""FamilyConformance: what `families/__init__.py` asks of a family's module, turned into tests.

    class TestAcme(FamilyConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def config(cls):
            return {"model_type": "acme", "vocab_size": 97, "hidden_size": 48, ...}

The config.json is a small one, of which every key should matter. Checkpoints are made from it here: one of
random weights, one whose numbers are all different, and, where transformers knows the architecture, one that
transformers wrote. This file knows no family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from nanovllm.components import build
from nanovllm.config import load
from nanovllm.errors import ModelError, NanoVLLMError
from nanovllm.plugins import discover
from nanovllm.runner import LogitsRunner
from nanovllm.testing.driver import Doubles, Driver
from nanovllm.testing.hygiene import Hygiene
from nanovllm.testing.suite import level

from .checkpoint import load_checkpoint
from .config import Config
from .layout import stored_weights
from .made_checkpoints import counting_tensors, random_tensors, write_checkpoint
from .registry import Family
from .spec import ACTIVATIONS, NORMS, DecoderSpec, Experts

Read = Callable[..., DecoderSpec]  # (key=value, ...) -> the spec of the config with these changes

_MOST = 2**23  # parameters: so many whole numbers are all different in float32
_ABSENT = object()  # a key's value that takes the key out


class FamilyConformance(Hygiene):
    """Whether a family's module reads configs and files as it must, and says what transformers computes.

    Fixture `config`: a small config.json, of which every key matters. `atol`: how far logits may be from those of
    transformers; `transformers_options`: keys that its config gets besides.
    """

    group = "models"
    transformers_options: ClassVar[Mapping[str, Any]] = {"attn_implementation": "eager"}
    atol: ClassVar[float] = 1e-4

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, config: Mapping[str, Any], makeable: None) -> Any:
        return cls.make(config)

    @pytest.fixture(scope="class")
    @classmethod
    def read(cls, family: Family, config: Mapping[str, Any]) -> Read:
        def read(**changes: Any) -> DecoderSpec:
            values = {k: v for k, v in {**config, **changes}.items() if v is not _ABSENT}
            reader = Config(values, "config.json")
            spec = family.spec(reader)
            reader.finish()
            return spec

        return read

    @pytest.fixture(scope="class")
    @classmethod
    def keys(cls, family: Family, spec: DecoderSpec, config: Mapping[str, Any]) -> list[str]:
        """The keys of the config that the family reads."""
        reader = Config(config, "config.json")
        family.spec(reader)
        return sorted(reader.read & config.keys())

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, read: Read) -> DecoderSpec:
        """Skips what needs it where test_the_config_is_read fails."""
        try:
            spec = read()
            is_small = spec.num_parameters <= _MOST
        except Exception:
            pytest.skip("the config is not read")
        if not is_small:
            pytest.skip("the config describes too large a model")
        return spec

    @pytest.fixture(scope="class")
    @classmethod
    def runner(cls, family: Family, spec: DecoderSpec, config: Mapping[str, Any], tmp_path_factory: Any) -> Any:
        """The NumPy runner on random weights."""
        directory = tmp_path_factory.mktemp("random")
        write_checkpoint(directory, config, random_tensors(family, spec))
        with numpy_runner(directory) as runner:
            yield runner

    # ------------------------------------------------------------------------------------- basic

    @level("basic")
    def test_the_module_has_every_member(self, family: Family) -> None:
        kinds = {"PREFIX": str, "LAYOUT": dict, "TRANSPOSED": frozenset, "GROUPED": frozenset, "IGNORED": str}
        for name, kind in kinds.items():
            found = getattr(family, name, None)
            assert isinstance(found, kind), f"{name} is {found!r:.60}, not a {kind.__name__}"
        assert callable(getattr(family, "spec", None)), "the module has no function spec(config)"
        for name in ("TRANSPOSED", "GROUPED"):
            strangers = sorted(getattr(family, name) - family.LAYOUT.keys())
            assert not strangers, f"{name} names {strangers[0]!r}, which is not in LAYOUT"
        has_prefix = any(name.startswith(family.PREFIX) for name in family.LAYOUT)
        assert has_prefix, f"no module of LAYOUT begins with PREFIX, {family.PREFIX!r}"
        try:
            re.compile(family.IGNORED)
        except re.error as e:
            pytest.fail(f"IGNORED is no regular expression: {e}")

    @level("basic")
    def test_the_config_is_read(self, read: Read) -> None:
        spec = read()
        assert isinstance(spec, DecoderSpec), f"spec(config) returned a {type(spec).__name__}, not a DecoderSpec"
        size = spec.num_parameters
        assert size <= _MOST, f"config describes {size:,} parameters: take a small one, of {_MOST:,} at most"

    @level("basic")
    def test_the_spec_is_complete(self, spec: DecoderSpec, config: Mapping[str, Any]) -> None:
        try:
            hash(spec)
        except TypeError as e:
            pytest.fail(f"the spec is not frozen all the way down: {e}")
        assert spec.architecture == config["model_type"], f"architecture is {spec.architecture!r}, not the model_type"
        attention = spec.attention
        for name, per_layer in (("mlps", spec.mlps), ("rotary", attention.rotary), ("windows", attention.windows)):
            assert len(per_layer) == spec.num_layers, (
                f"{name} has {len(per_layer)} entries for {spec.num_layers} layers"
            )
        assert attention.num_heads % attention.num_kv_heads == 0, "num_kv_heads does not divide num_heads"
        for mlp in spec.mlps:
            one = mlp.expert if isinstance(mlp, Experts) else mlp
            assert one.activation in ACTIVATIONS, f"activation {one.activation!r} is none of {', '.join(ACTIVATIONS)}"
        assert spec.norm.kind in NORMS, f"norm {spec.norm.kind!r} is none of {', '.join(NORMS)}"
        factors = (attention.scale, spec.norm.eps, spec.embedding_scale, spec.residual_scale, spec.logits_scale)
        assert all(isfinite(x) and x > 0 for x in factors), f"a factor is not a positive number: {factors}"

    @level("basic")
    def test_every_weight_has_one_place(self, family: Family, spec: DecoderSpec) -> None:
        named = [name for names in {s.names for s in stored_weights(family, spec)} for name in names]
        twice = sorted({name for name in named if named.count(name) > 1})
        assert not twice, f"LAYOUT puts {twice[0]} into two tensors"
        lacking = sorted(spec.shapes().keys() - set(named))
        assert not lacking, f"LAYOUT has no place for {lacking[0]}, which the spec has"

    @level("basic")
    def test_every_number_of_a_file_is_used_once(
        self, family: Family, spec: DecoderSpec, config: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """Under the names with the prefix, and under those of the base model without it."""
        tensors = counting_tensors(family, spec)
        total = sum(t.size for t in tensors.values())
        for prefix in ("", family.PREFIX):
            directory = tmp_path / f"without-{prefix or 'nothing'}"
            write_checkpoint(directory, config, {n.removeprefix(prefix): t for n, t in tensors.items()})
            checkpoint = load_checkpoint(directory)
            assert checkpoint.num_parameters == spec.num_parameters == total, (
                f"the file has {total:,} numbers, the spec's formula gives {spec.num_parameters:,}"
            )
            used = np.concatenate([t.array.ravel() for t in checkpoint.weights.values()])
            assert np.array_equal(np.sort(used), np.arange(total)), "some numbers are used twice and others never"

    @level("basic")
    def test_the_numpy_runner_computes_it(self, runner: LogitsRunner, spec: DecoderSpec) -> None:
        rows = whole(runner, _tokens(spec, 12))
        assert rows.shape == (12, spec.vocab_size), f"12 tokens give logits of shape {rows.shape}"
        assert np.isfinite(rows).all(), "random weights give logits that are not finite"
        assert len(np.unique(rows, axis=0)) == 12, "all positions have the same logits"

    @level("basic")
    def test_the_logits_are_those_of_transformers(
        self, config: Mapping[str, Any], spec: DecoderSpec, tmp_path: Path
    ) -> None:
        """On a random model that transformers made and wrote; ours reads its files."""
        torch = pytest.importorskip("torch", reason="the oracle is not installed: pip install torch transformers")
        transformers = pytest.importorskip(
            "transformers", reason="the oracle is not installed: pip install transformers"
        )
        name = config["model_type"]
        self.skip_unless(name in transformers.CONFIG_MAPPING, f"this transformers does not know {name!r}")
        values = {k: v for k, v in config.items() if k != "model_type"}
        described = transformers.AutoConfig.for_model(name, **values, **self.transformers_options)
        model = transformers.AutoModelForCausalLM.from_config(described).float().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # biases and norms start as 0 and 1, which would hide mistakes
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() < 2:
                    parameter.add_(noise * 0.2)
                else:
                    parameter.copy_(noise * 2 / parameter.shape[-1] ** 0.5)
        model.save_pretrained(tmp_path)
        tokens = _tokens(spec, min(32, spec.max_positions))
        with torch.no_grad():
            wanted = model(torch.tensor([tokens])).logits[0].double().numpy()
        assert wanted.std() > 0.01, "transformers' logits are all alike: the comparison would mean nothing"
        with numpy_runner(tmp_path) as runner:
            rows = whole(runner, tokens)
        worst = np.abs(rows - wanted).max(axis=1)  # (T,)
        first = int((worst > self.atol).argmax())
        assert worst.max() <= self.atol, (
            f"the logits of position {first} are {worst[first]:.3g} away from those of transformers, "
            f"where {self.atol:g} is allowed"
        )

    # ----------------------------------------------------------------------------- batched, paged

    @level("batched")
    def test_alone_and_in_company(self, runner: LogitsRunner, spec: DecoderSpec) -> None:
        texts = [_tokens(spec, n, seed=n) for n in (9, 3, 14)]
        driver = Driver(runner)
        together = driver.step(*[(driver.begin(text), len(text), len(text)) for text in texts])
        driver.end_all()
        for text, rows in zip(texts, together, strict=True):
            _check_close(rows, whole(runner, text), f"{len(text)} tokens in company")

    @level("paged")
    def test_in_chunks_and_whole(self, runner: LogitsRunner, spec: DecoderSpec) -> None:
        """Windows, rotations and learned positions must not depend on where a chunk begins."""
        tokens = _tokens(spec, min(30, spec.max_positions))
        driver = Driver(runner, shuffle=0)
        text = driver.begin(tokens)
        parts = []
        while text.left:
            num = min(7, text.left)
            parts += driver.step((text, num, num))
        driver.end_all()
        _check_close(np.concatenate(parts), whole(runner, tokens), f"{len(tokens)} tokens in chunks of 7")

    # ------------------------------------------------------------------------------------ robust

    @level("robust")
    def test_a_key_that_may_matter_is_refused_by_name(self, read: Read) -> None:
        for value in (7, 0.5, True, "surprise", [1], {"a": 1}):
            self._refused(read, "surprising_key", value)

    @level("robust")
    def test_a_wrong_type_is_refused_by_name(self, read: Read, keys: list[str], config: Mapping[str, Any]) -> None:
        for key in keys:
            if isinstance(config[key], (bool, int, float)):
                self._refused(read, key, "surprise")
                self._refused(read, key, [1, 2])
            elif isinstance(config[key], str) and key != "model_type":
                self._refused(read, key, "surprise")
                self._refused(read, key, 7)

    @level("robust")
    def test_no_value_is_more_than_refused(self, read: Read, keys: list[str], config: Mapping[str, Any]) -> None:
        """Whatever stands in a file ends in a spec or in an error of ours."""
        values: tuple[Any, ...] = (
            _ABSENT,
            None,
            0,
            1,
            -1,
            10**30,
            0.5,
            float("nan"),
            True,
            "",
            "surprise",
            [],
            [None],
            {},
            {"a": [1]},
        )
        for key in (*keys, "rope_parameters", "rope_scaling", "layer_types", "head_dim"):
            for value in values:
                try:
                    read(**{key: value})
                except NanoVLLMError:
                    continue
                except Exception as e:
                    said = "absent" if value is _ABSENT else f"{value!r}"
                    pytest.fail(f"where {key} is {said}, reading the config raises {type(e).__name__}: {e}")

    @level("robust")
    def test_every_key_of_the_config_matters(self, read: Read, keys: list[str], config: Mapping[str, Any]) -> None:
        """A key that is read and changes nothing was forgotten half-way, or does not belong into this config."""
        before = read()
        for key in keys:
            changes = _others(config[key])
            if changes and all(_same(read, key, value, before) for value in changes):
                pytest.fail(f"{key} is read, and no other value of it changes the spec")

    @level("robust")
    def test_tensors_that_do_not_belong_are_refused_by_name(
        self, family: Family, spec: DecoderSpec, config: Mapping[str, Any], tmp_path: Path
    ) -> None:
        tensors = random_tensors(family, spec)
        strange = f"{family.PREFIX}layers.0.surprise.weight"
        first = next(iter(tensors))
        cases = {
            "unexpected": ({**tensors, strange: np.ones(3, np.float32)}, strange),
            "missing": ({n: t for n, t in tensors.items() if n != first}, first),
            "of a wrong shape": ({**tensors, first: tensors[first][..., :-1]}, first),
        }
        for what, (changed, name) in cases.items():
            directory = tmp_path / what
            write_checkpoint(directory, config, changed)
            try:
                load_checkpoint(directory)
            except ModelError as e:
                said = str(e)
            else:
                pytest.fail(f"a tensor that is {what} is accepted: {name}; does IGNORED match too much?")
            assert name in said, f"a tensor that is {what} is refused without its name, {name}: {said}"

    @level("robust")
    def test_tied_embeddings(
        self, family: Family, spec: DecoderSpec, config: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """A file may hold the head too where it is the embedding, and nothing else."""
        self.skip_unless(spec.tied_embeddings, "the config does not tie the embeddings")
        head = next((name for name, modules in family.LAYOUT.items() if modules == "lm_head"), None)
        assert head is not None, "LAYOUT has no lm_head, which tied embeddings may be stored under"
        tensors = random_tensors(family, spec)
        [embedding] = [s.file_name for s in stored_weights(family, spec) if s.names == ("embed.tokens.weight",)]
        write_checkpoint(tmp_path / "same", config, {**tensors, f"{head}.weight": tensors[embedding]})
        assert load_checkpoint(tmp_path / "same").num_parameters == spec.num_parameters, "the head is counted as well"
        write_checkpoint(tmp_path / "other", config, {**tensors, f"{head}.weight": tensors[embedding] + 1})
        with pytest.raises(ModelError):
            load_checkpoint(tmp_path / "other")

    # ----------------------------------------------------------------------------- deterministic

    @level("deterministic")
    def test_reading_changes_nothing(self, family: Family, config: Mapping[str, Any]) -> None:
        before = deepcopy(dict(config))
        first, second = (family.spec(Config(config, "config.json")) for _ in range(2))
        assert first == second, "the same config gives two specs"
        assert config == before, "reading the config changes it"

    # ----------------------------------------------------------------------------------- helpers

    def _refused(self, read: Read, key: str, value: object) -> None:
        try:
            read(**{key: value})
        except ModelError as e:
            said = str(e)
        except Exception as e:
            pytest.fail(f"{key} = {value!r} raises {type(e).__name__}: {e}")
        else:
            pytest.fail(f"{key} = {value!r} is accepted")
        assert key in said, f"{key} = {value!r} is refused without its name: {said}"


# ------------------------------------------------------------------------------------- computing


@contextmanager
def numpy_runner(directory: Path) -> Iterator[LogitsRunner]:
    """The NumPy runner on a directory; skips where it is not installed."""
    if not any(found.name == "numpy" for found in discover("runners")):
        pytest.skip("the NumPy runner is not installed: pip install 'nanovllm[numpy]'")
    config = {"model": str(directory), "runner": "numpy", "tokenizer": "simple"}
    sizes = ["scheduler.max_num_seqs=8", "cache.block_size=4", "cache.num_blocks=64"]
    runner = build(load(overrides=config, sets=sizes, environ={})).runner
    assert isinstance(runner, LogitsRunner), "the NumPy runner returns logits"
    try:
        yield runner
    finally:
        runner.close()


def whole(runner: LogitsRunner, tokens: Sequence[int]) -> Doubles:
    """(T, vocab) logits of all positions, computed in one step."""
    driver = Driver(runner)
    [rows] = driver.step((driver.begin(tokens), len(tokens), len(tokens)))
    driver.end_all()
    return rows


def _tokens(spec: DecoderSpec, num: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, spec.vocab_size, num).tolist()
    return found


def _check_close(rows: Doubles, wanted: Doubles, what: str) -> None:
    worst = float(np.abs(rows - wanted).max())
    assert worst < 1e-3, f"the logits of {what} are {worst:.3g} away from those of the same tokens alone and whole"


def _others(value: object) -> list[Any]:
    """Other values of the same type, one of which may be possible."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, value - 1, max(1, value // 2)]
    return [value * 1.5, value / 2] if isinstance(value, float) else []


def _same(read: Read, key: str, value: object, before: DecoderSpec) -> bool:
    try:
        return read(**{key: value}) == before
    except NanoVLLMError:
        return False
