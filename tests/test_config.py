"""Configuration: sources and their order, origins, aliases, refusals; the docs are what the schema says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from nanovllm import schema, sources
from nanovllm.cli import cli
from nanovllm.config import Config, leaves, load
from nanovllm.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(**arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**{"environ": {}, **arguments})
    return str(caught.value)


# --------------------------------------------------------------------------------- order and origin


def test_each_source_beats_the_one_below_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, "scheduler: {max_num_seqs: 2, max_num_batched_tokens: 128, max_model_len: 64}\n")
    environ = {"NANOVLLM_SCHEDULER__MAX_NUM_SEQS": "3", "NANOVLLM_SCHEDULER__MAX_NUM_BATCHED_TOKENS": "129"}
    loaded = load(path, environ=environ, sets=["scheduler.max_num_seqs=4"], overrides={"cache.block_size": 8})
    scheduler = loaded.config.scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens, scheduler.max_model_len) == (4, 129, 64)
    assert loaded.config.cache.block_size == 8
    assert loaded.origins == {
        "scheduler.max_num_seqs": "--set",
        "scheduler.max_num_batched_tokens": "environment variable NANOVLLM_SCHEDULER__MAX_NUM_BATCHED_TOKENS",
        "scheduler.max_model_len": str(path),
        "cache.block_size": "argument",
    }
    assert (
        load(environ={}, sets=["cache.block_size=4"], overrides={"cache": {"block_size": 8}}).config.cache.block_size
        == 8
    )


def test_documented_defaults() -> None:
    config = load(environ={}).config
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (32, 2048)  # C3
    assert (config.model, config.runner.type, config.tokenizer.type, config.sampler.type) == (
        "demo", "numpy", "auto", "auto",
    )  # fmt: skip


def test_the_process_environment_is_read_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_RUNNER__TYPE", "mock")
    assert load().config.runner.type == "mock"
    assert load(environ={}).config.runner.type == "numpy"


def test_seed_variables_and_empty_ones() -> None:
    loaded = load(environ={"MODEL_PATH": "./m", "TOKENIZER_PATH": "t/tokenizer.json", "NANOVLLM_RUNNER": ""})
    assert (loaded.config.model, loaded.config.tokenizer.path) == ("./m", "t/tokenizer.json")
    assert loaded.origins["model"] == "environment variable MODEL_PATH"
    assert load(environ={"MODEL_PATH": "a", "NANOVLLM_MODEL": "b"}).config.model == "b"


def test_text_keys_stay_text() -> None:
    config = load(environ={"MODEL_PATH": "123"}, sets=["tokenizer.path=1e3", "runner=mock"]).config
    assert (config.model, config.tokenizer.path, config.runner.type) == ("123", "1e3", "mock")
    assert load(environ={}, sets=["model=null"]).config.model == "null"


def test_path_objects_are_texts() -> None:
    assert load(environ={}, overrides={"model": Path("a/b")}).config.model == str(Path("a/b"))


def test_short_form_is_the_type() -> None:
    short, long = load(environ={}, sets=["runner=mock"]), load(environ={}, overrides={"runner": {"type": "mock"}})
    assert short.config == long.config


@pytest.mark.parametrize(
    ("file", "sets", "options"),
    [
        ("runner: {type: a, threads: 4, seed: 1}", ["runner.type=b"], {}),
        ("runner: {type: a, seed: 1}", ["runner.type=b", "runner.depth=2"], {"depth": 2}),
        ("runner: {type: a, seed: 1}", ["runner.type=a"], {"seed": 1}),
        ("runner: {seed: 1}", ["runner=numpy"], {"seed": 1}),  # the default's name changes nothing
        ("runner: {seed: 1}", ["runner=mock"], {}),
        ("runner: {type: purego, seed: 1}", ["runner=onnx"], {"seed": 1}),  # one runner by two names
    ],
)
def test_a_changed_type_replaces_the_section(tmp_path: Path, file: str, sets: list[str], options: dict) -> None:
    runner = load(write(tmp_path, file), environ={}, sets=sets).config.runner
    assert runner.options == options
    assert runner.threads is None


def test_naming_the_tokenizer_keeps_what_was_set_while_it_was_auto() -> None:
    environ = {"TOKENIZER_PATH": "t"}
    assert load(environ=environ, sets=["tokenizer=hf"]).config.tokenizer.path == "t"
    assert load(environ=environ | {"NANOVLLM_TOKENIZER": "hf"}, sets=["tokenizer=other"]).config.tokenizer.path is None


def test_flags_and_overrides_of_one_call_belong_together() -> None:
    runner = load(environ={}, sets=["runner.seed=3"], overrides={"runner": "mock"}).config.runner
    assert (runner.type, runner.options) == ("mock", {"seed": 3})


def test_paths_of_a_file_start_at_the_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, "model: ./m\ntokenizer: {path: t}\n"), environ={}).config
    assert Path(config.model) == tmp_path / "m"
    assert Path(config.tokenizer.path or "") == tmp_path / "t"
    for text in ("demo", "some/name", str(tmp_path), "~/m"):
        assert load(write(tmp_path, f"model: {text}"), environ={}).config.model == text


def test_nested_plugin_options_and_what_they_replace(tmp_path: Path) -> None:
    path = write(tmp_path, "runner: {type: x, a: {b: 1, c: 2}, d: 3}")
    assert load(path, environ={}, sets=["runner.a.b=5"]).config.runner.options == {"a": {"b": 5, "c": 2}, "d": 3}
    assert load(path, environ={}, sets=["runner.a=5"]).config.runner.options == {"a": 5, "d": 3}
    assert load(path, environ={}, sets=["runner.d.e=5"]).config.runner.options == {"a": {"b": 1, "c": 2}, "d": {"e": 5}}


# ----------------------------------------------------------------------------------------- aliases


def test_nano_vllm_names() -> None:
    loaded = load(
        environ={},
        overrides={
            "max_num_batched_tokens": 16384, "max_num_seqs": 512, "max_model_len": 4096, "kvcache_block_size": 256,
            "num_kvcache_blocks": -1, "eos": -1, "enforce_eager": True, "tensor_parallel_size": 1,
            "gpu_memory_utilization": 0.5,
        },
    )  # fmt: skip
    assert loaded.config.scheduler.model_dump(exclude={"stall_seconds"}) == {
        "max_num_batched_tokens": 16384, "max_num_seqs": 512, "max_model_len": 4096,
    }  # fmt: skip
    assert (loaded.config.cache.block_size, loaded.config.cache.num_blocks, loaded.config.eos) == (256, None, None)
    assert loaded.config.cache.gpu_share == 0.5
    assert [note.split()[0] for note in loaded.notes] == ["enforce_eager", "tensor_parallel_size"]
    assert load(environ={}, sets=["eos=151643"]).config.eos == (151643,)
    assert load(environ={}, sets=["eos=[1, 2]"]).config.eos == (1, 2)
    assert load(environ={}, overrides={"eos": []}).config.eos == ()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "tensor_parallel_size",
            2,
            "must be 1, not 2 (argument): one process runs the model; tensor parallelism",
        ),
        ("tensor_parallel_size", True, "must be 1"),
        ("enforce_eager", "yes", "must be true or false"),
        ("gpu_memory_utilization", 1.5, "cache.gpu_share: should be less than or equal to 1, not 1.5"),
        ("gpu_memory_utilization", 0, "cache.gpu_share: should be greater than 0, not 0"),
        ("gpu_memory_utilization", float("nan"), "cache.gpu_share: should be a finite number"),
    ],
)
def test_nano_vllm_values_that_would_mislead(name: str, value: object, says: str) -> None:
    assert says in refused(overrides={name: value})


def test_build_tags_name_runners() -> None:
    assert load(environ={}, sets=["runner=purego"]).config.runner.type == "onnx"
    assert load(environ={}, sets=["runner.type=pytorch@acme"]).config.runner.type == "torch@acme"


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["scheduler.max_num_seq=4"], "unknown key 'scheduler.max_num_seq' (--set); did you mean 'max_num_seqs'?"),
        (["modle=x"], "unknown key 'modle' (--set); did you mean 'model'?"),
        (["hf_config=x"], "unknown key 'hf_config'"),
        (["scheduler.max_num_seqs=0"], "scheduler.max_num_seqs: should be greater than or equal to 1, not 0 (--set)"),
        (["scheduler.max_num_seqs=true"], "scheduler.max_num_seqs: should be a valid integer, not True"),
        (["scheduler.max_num_seqs=1.0"], "should be a valid integer, not 1.0"),
        (["scheduler.max_num_seqs='4'"], "should be a valid integer, not '4'"),
        (["scheduler.max_num_seqs=" + "9" * 40], "less than or equal to 65536"),
        (["scheduler.stall_seconds=.nan"], "scheduler.stall_seconds"),
        (["scheduler.stall_seconds=.inf"], "scheduler.stall_seconds"),
        (["scheduler=5"], "'scheduler' must hold `key: value` lines, not 5 (--set)"),
        (["model="], "model: String should have at least 1 character"),
        (["runner="], "runner.type: String should have at least 1 character"),
        (["runner.threads=0"], "runner.threads: should be greater than or equal to 1, not 0 (--set)"),
        (["runner=[a]"], "no runner"),
        (["cache.memory=lots"], "cache.memory: must be a size such as 512MiB or 1.5GB, not 'lots' (--set)"),
        (["cache.memory=1XB"], "must be a size"),
        (["cache.memory=0"], "greater than or equal to 1"),
        (["cache.memory=" + "9" * 400 + "TB"], "must be a size"),
        (["cache.block_size=-1"], "cache.block_size"),
        (["eos=[1, -2]"], "eos.1: should be greater than or equal to 0, not -2"),
        (["plugins=trace"], "plugins: "),
        (["max_num_batched_tokens=31"], "max_num_batched_tokens (31) is smaller than scheduler.max_num_seqs (32)"),
        (["model"], "--set 'model' is not of the form key=value"),
        (["=x"], "is not of the form key=value"),
        (["a..b=1"], "unknown key 'a'"),
        (["scheduler.max_num_seqs=[1"], "the value of 'scheduler.max_num_seqs' (--set) is not accepted"),
        (["scheduler.max_num_seqs=" + "[" * 5000], "nested too deeply"),
        (["runner.a=&x [*x]"], "aliases (*name) are not allowed"),
        (["runner.a=!!python/object/apply:os.getcwd []"], "could not determine a constructor"),
        (["runner.a=2020-13-45"], "has a value that cannot be read"),
    ],
)  # fmt: skip
def test_refused_in_one_sentence(sets: list[str], says: str) -> None:
    if says == "no runner":  # `runner` is a text key: taken as it stands, and refused when it is looked up
        assert load(environ={}, sets=sets).config.runner.type == "[a]"
        return
    message = refused(sets=sets)
    assert says in message
    assert "\n" not in message


def test_the_seeds_small_memory_setting_is_legal() -> None:
    config = load(environ={}, sets=["max_num_seqs=16", "max_num_batched_tokens=1024"]).config
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (16, 1024)  # C2, S0-29


def test_unknown_environment_variables_are_refused() -> None:
    message = refused(environ={"NANOVLLM_RUNER__TYPE": "mock"})
    assert message == "unknown key 'runer' (environment variable NANOVLLM_RUNER__TYPE); did you mean 'runner'?"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "must hold `key: value` lines, not a list"),
        ("just text", "must hold `key: value` lines, not a str"),
        ("model: a\nscheduler: [\n", "x.yaml, line 3 is not accepted"),
        (
            "model: a\ncache:\n  block_size: 1\n  block_size: 2\n",
            "x.yaml, line 4 is not accepted: the key 'block_size'",
        ),
        ("cache: {block_size: 1}\ncache.block_size: 2\n", "'cache.block_size' is given twice"),
        ("max_num_seqs: 1\nscheduler: {max_num_seqs: 2}\n", "'scheduler.max_num_seqs' is given twice"),
        ("a: &a [x]\nb: *a\n", "x.yaml, line 2 is not accepted: aliases (*name) are not allowed"),
        ("a: &a {b: 1}\nmodel: {<<: *a}\n", "aliases (*name) are not allowed"),
        ("on: 1\n", "the key True"),
        ("runner: {1: 2}\n", "the key 1 in 'runner'"),
        ("model: !!python/name:os.system x\n", "could not determine a constructor"),
        ("model: a\n---\nmodel: b\n", "expected a single document"),
        ("model: {a: 1}\n", "model: should be a valid string"),
        ("model: 5\n", "model: should be a valid string, not 5"),
        ("runner:\n", "runner.type: should be a valid string, not None"),
        ("\x00", "is not YAML"),
        ("[" * 20000, "nested too deeply"),
        ("#" * (sources.MAX_YAML_BYTES + 1), "is larger than"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    message = refused(path=write(tmp_path, text))
    assert says in message
    assert "\n" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in refused(path=tmp_path / "absent.yaml")
    assert "cannot be read" in refused(path=tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    assert "is not UTF-8 text (byte 10)" in refused(path=tmp_path / "latin.yaml")


def test_files_that_say_little_are_fine(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "cache:\n", "runner: {}\n", "\ufeffmodel: demo\n"):
        assert load(write(tmp_path, text), environ={}).config == Config()


def test_an_empty_section_removes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "cache: {block_size: 4}")
    assert load(path, environ={}, overrides={"cache": {}}).config.cache.block_size == 4


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*Config.model_fields, "profile", "profiles"])
                | st.sampled_from(["type", "threads", "path", "max_num_seqs", "memory", "x.y"])
                | st.text(max_size=3)
                | st.integers(),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_whatever_a_file_says_it_loads_or_is_refused_with_a_config_error(tmp_path_factory, tree: object) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    try:
        loaded = load(path, environ={})
    except ConfigError as e:
        assert "\n" not in str(e)  # noqa: PT017
    else:
        assert load(environ={}, overrides=dict(leaves(loaded.config))).config == loaded.config


@pytest.mark.parametrize(
    ("text", "value"), [("1GiB", 2**30), ("1.5 GB", 1_500_000_000), ("512mib", 2**29), ("100B", 100), ("7", 7)]
)
def test_sizes(text: str, value: int) -> None:
    assert load(environ={}, overrides={"cache.memory": text}).config.cache.memory == value


def test_values_cannot_be_changed() -> None:
    config = load(environ={}).config
    with pytest.raises(ValueError, match="frozen"):
        config.scheduler.max_num_seqs = 1  # type: ignore[misc]


def test_what_config_show_prints_loads_again() -> None:
    before = load(environ={}, sets=["runner=mock", "runner.script.delay=1", "cache.memory=1GiB", "eos=[3]"]).config
    assert load(environ={}, overrides=dict(leaves(before))).config == before


# -------------------------------------------------------------------------------------- profiles

PROFILES = """
model: ./models/x
profile: dev
runner: {type: mock, seed: 3}
profiles:
  dev: {scheduler: {max_num_seqs: 4}}
  prod:
    model: ../y
    runner: {seed: 5, threads: 2}
    max_num_seqs: 8
  other: {runner: numpy}
"""


def test_a_profile_lies_between_the_rest_of_the_file_and_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path, PROFILES)
    loaded = load(path, environ={"NANOVLLM_RUNNER__THREADS": "1"}, overrides={"profile": "prod"})
    assert loaded.config.model == str(tmp_path / "../y")
    assert loaded.config.runner.options == {"seed": 5}
    assert (loaded.config.runner.threads, loaded.config.scheduler.max_num_seqs) == (1, 8)
    assert loaded.origins["scheduler.max_num_seqs"] == f"{path}, profile prod"
    assert loaded.profiles == ("dev", "prod", "other")


def test_who_chooses_the_profile(tmp_path: Path) -> None:
    path = write(tmp_path, PROFILES)
    by_file = load(path, environ={}).config
    assert (by_file.scheduler.max_num_seqs, by_file.runner.options) == (4, {"seed": 3})
    environ = {"NANOVLLM_PROFILE": "prod"}
    assert load(path, environ=environ).config.scheduler.max_num_seqs == 8
    assert load(path, environ=environ, sets=["profile=dev"]).config.scheduler.max_num_seqs == 4
    assert load(path, environ={}, overrides={"profile": None}).config.scheduler.max_num_seqs == 32


def test_a_profile_that_changes_the_type_replaces_the_section(tmp_path: Path) -> None:
    assert load(write(tmp_path, PROFILES), environ={}, sets=["profile=other"]).config.runner.options == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("profile: prod", "there is no profile 'prod' ({file}); a YAML file (--config) defines profiles"),
        ("profile: x\nprofiles: {dev: {}, prod: {}}", "the file has dev, prod"),
        ("profile: [dev]\nprofiles: {dev: {}}", "there is no profile ['dev']"),
        ("profiles: [dev]", "'profiles' must hold a name and `key: value` lines below it, not ['dev']"),
        ("profiles: {dev: 1}", "the profile 'dev' must hold `key: value` lines, not 1"),
        ("profiles: {1: {}}", "a profile's name must be a text, not 1"),
        ("profile: a\nprofiles: {a: {rnner: numpy}}", "unknown key 'rnner' ({file}, profile a)"),
        ("profile: a\nprofiles: {a: {profile: a}}", "unknown key 'profile' ({file}, profile a)"),
    ],
)
def test_profiles_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    assert says.replace("{file}", str(path)) in refused(path=path)


def test_check_looks_at_every_profile(tmp_path: Path) -> None:
    path = write(tmp_path, "runner: mock\nprofiles: {a: {runner: {seed: 1}}, b: {runner: {sed: 1}}}")
    done = CliRunner().invoke(cli, ["config", "check", str(path)])
    assert f"unknown key 'runner.sed' ({path}, profile b)" in done.output
    path = write(tmp_path, "runner: mock\nenforce_eager: true\nprofiles: {a: {}, b: {}}")
    assert CliRunner().invoke(cli, ["config", "check", str(path)]).output.count("note: enforce_eager") == 1


# ------------------------------------------------------------------------------- schema and docs


def test_the_schema_agrees_with_the_loader() -> None:
    described = schema.json_schema()
    assert set(described["properties"]) == {*Config.model_fields, "profile", "profiles"}
    runner = described["properties"]["runner"]["anyOf"][1]
    mock = next(v for v in runner["then"]["oneOf"] if v["properties"]["type"] == {"const": "mock"})
    assert {"seed", "vocab_size", "threads"} <= set(mock["properties"])
    assert mock["additionalProperties"] is False
    references = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(described)))
    assert references <= set(described["$defs"])
