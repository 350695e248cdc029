"""The plugin border, tried with fake distributions: metadata, a module and an entry point in a directory."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nanovllm
from nanovllm import components, plugins
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm.builtin.plugins import MockScript
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.config import load
from nanovllm.errors import ConfigError, ModelError, NanoVLLMError, PluginError
from nanovllm.hookspecs import API_VERSION
from nanovllm.llm import LLM
from nanovllm.loader import Plugins
from nanovllm.request import SamplingParams
from nanovllm.sampler import NumpySampler
from site_of_fakes import Install, fake_site
from support import REPO


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from fake_site(tmp_path / "site", monkeypatch)


RUNNER = """
from nanovllm.hookspecs import hookimpl

class Plugin:
    api_version = 1
    {body}

plugin = Plugin()
"""
MOCK = """
    @hookimpl
    def create_runner(self, ctx):
        from nanovllm.builtin.mock import MockRunner
        return MockRunner(seed=%d)
"""


def runner_module(body: str) -> str:
    return RUNNER.format(body=body.strip())


def fails(group: str, name: str) -> str:
    with pytest.raises(PluginError) as caught:
        Plugins().load(group, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def built(**overrides: object) -> components.Components:
    return components.build(load(environ={}, overrides={"tokenizer": "simple", **overrides}))


# --------------------------------------------------------------------------------------- finding


def test_the_core_finds_itself_like_everybody_else() -> None:
    found = {(f.group, f.name): f for f in plugins.discover()}
    for group, name in (("runners", "mock"), ("tokenizers", "simple"), ("samplers", "numpy")):
        assert found[group, name].distribution == "nanovllm"
        assert Plugins().load(group, name).found == found[group, name]


def test_listing_imports_nothing(install: Install) -> None:
    install("acme", {"nanovllm.runners": "boom = acme_boom:plugin"}, acme_boom="raise SystemExit('imported')")
    found = plugins.find("runners", "boom")
    assert (found.distribution, found.version, str(found)) == ("acme", "1.0", "runners:boom@acme")
    assert "acme_boom" not in sys.modules


def test_not_installed_names_what_is_and_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [e for e in entry_points(group=group) if e.name != "http"]
    )
    have = ", ".join(dict.fromkeys(f.name for f in plugins.discover("runners")))
    expected = f"no runner named 'http' is installed (have: {have}); try: pip install 'nanovllm[http]'"
    assert fails("runners", "http") == expected
    assert "pip" not in fails("runners", "unheard-of")
    assert fails("runners", "mocc").endswith("did you mean 'mock'?")
    assert fails("observers", "x") == "no observer named 'x' is installed (have: none)"


def test_every_pip_line_for_the_core_names_an_extra() -> None:
    metadata = importlib.import_module("importlib.metadata").metadata("nanovllm")
    extras = set(metadata.get_all("Provides-Extra"))
    for (group, name), target in plugins._OFFICIAL.items():
        assert plugins.pip_hint(group, name) == f"try: pip install '{target}'"
        if target.startswith("nanovllm["):
            assert target[len("nanovllm[") : -1] in extras


def test_two_providers_of_a_name_clash_only_when_it_is_used(install: Install) -> None:
    for letter, seed in (("a", 1), ("b", 2)):
        module = {f"acme_{letter}": runner_module(MOCK % seed)}
        install(f"acme-{letter}", {"nanovllm.runners": f"dup = acme_{letter}:plugin"}, **module)
    assert len([f for f in plugins.discover("runners") if f.name == "dup"]) == 2
    assert fails("runners", "dup") == (
        "runner 'dup' is offered by acme-a 1.0 and acme-b 1.0; write dup@acme-a to choose"
    )
    assert built(runner="mock").loaded.config.runner.type == "mock"  # others are not disturbed
    for written in ("dup@acme-b", "dup@Acme_B"):
        runner = built(runner=written).runner
        assert isinstance(runner, MockRunner)
        assert runner._seed == 2
    assert "acme_a" not in sys.modules  # nobody chose it
    assert fails("runners", "dup@acme-c") == (
        "distribution 'acme-c' offers no runner named 'dup' (offered by: acme-a, acme-b)"
    )


def test_a_clash_over_the_cores_sampler_does_not_reach_auto(install: Install) -> None:
    install("acme", {"nanovllm.samplers": "numpy = acme_s:plugin"}, acme_s="raise RuntimeError")
    assert isinstance(built(runner="mock").sampler, NumpySampler)
    with pytest.raises(PluginError, match="write numpy@"):
        built(runner="mock", sampler="numpy")


# --------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import absent_library", "ModuleNotFoundError: No module named 'absent_library'"),
        ("1/0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("x = 1", "AttributeError: module 'acme_broken' has no attribute 'plugin'"),
        ("raise SystemExit('I quit')", "SystemExit: I quit"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
    ],
)
def test_a_broken_import_names_the_distribution_and_the_cause(install: Install, source: str, cause: str) -> None:
    install("acme", {"nanovllm.runners": "broken = acme_broken:plugin"}, acme_broken=source)
    message = fails("runners", "broken")
    assert message.startswith(f"runner 'broken' of acme 1.0 cannot be imported: {cause}")
    assert message.endswith("; repair it with: pip install --force-reinstall acme")


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ("", f"its author declares it with `api_version = {API_VERSION}` on the plugin object"),
        ("api_version = '1'", "does not say for which plugin API it was written"),
        (
            f"api_version = {API_VERSION + 1}",
            f"for plugin API {API_VERSION + 1}, and nanovllm {nanovllm.__version__} runs those for 1; try: pip install",
        ),
        ("api_version = -1", "try: pip install --upgrade acme"),
    ],
)
def test_api_versions(install: Install, declared: str, says: str) -> None:
    source = f"class Plugin:\n    {declared or 'pass'}\nplugin = Plugin()"
    install("acme", {"nanovllm.runners": "old = acme_old:plugin"}, acme_old=source)
    assert says in fails("runners", "old")


@pytest.mark.parametrize("version", [API_VERSION - 1, API_VERSION])
def test_the_previous_api_version_still_loads(monkeypatch: pytest.MonkeyPatch, install: Install, version: int) -> None:
    monkeypatch.setattr("nanovllm.hookspecs.API_VERSION", API_VERSION + 1)
    source = runner_module(MOCK % 0).replace("api_version = 1", f"api_version = {version + 1}")
    install("acme", {"nanovllm.runners": "x = acme_x:plugin"}, acme_x=source)
    assert Plugins().load("runners", "x").hooks == ["create_runner"]


@pytest.mark.parametrize(
    ("requires", "is_fine"),
    [
        ("nanovllm>=0.1,<0.3", True),
        ("nanovllm", True),
        ("NanoVLLM >= 0.1", True),
        ("other>=99", True),
        ("nanovllm>=99; extra == 'later'", True),
        ("nanovllm>=99", False),
        ("nanovllm<0.1", False),
    ],
)
def test_the_plugins_own_requirement_is_checked(install: Install, requires: str, is_fine: bool) -> None:
    entry_points = {"nanovllm.runners": "x = acme_x:plugin"}
    install("acme", entry_points, requires=requires, acme_x=runner_module(MOCK % 0))
    if is_fine:
        assert Plugins().load("runners", "x").found.distribution == "acme"
    else:
        specifier = requires.removeprefix("nanovllm")
        assert f"acme 1.0 needs nanovllm{specifier}, but nanovllm {nanovllm.__version__} is installed" in fails(
            "runners", "x"
        )
        assert "acme_x" not in sys.modules


def test_a_misspelt_hook_is_an_error(install: Install) -> None:
    source = runner_module(MOCK % 0).replace("create_runner", "create_runer")
    install("acme", {"nanovllm.runners": "x = acme_x:plugin"}, acme_x=source)
    assert fails("runners", "x") == (
        "plugin runners:x@acme implements an unknown hook 'create_runer'; did you mean 'create_runner'?"
    )


def test_a_hook_with_a_wrong_argument_is_an_error(install: Install) -> None:
    source = runner_module(MOCK % 0).replace("ctx", "context")
    install("acme", {"nanovllm.runners": "x = acme_x:plugin"}, acme_x=source)
    assert "plugin runners:x@acme has a wrong hook" in fails("runners", "x")
    assert "{'context'}" in fails("runners", "x")


def test_one_object_under_two_names_is_an_error(install: Install) -> None:
    lines = "x = acme_x:plugin"
    install("acme", {"nanovllm.runners": lines, "nanovllm.observers": lines}, acme_x=runner_module(MOCK % 0))
    with pytest.raises(PluginError, match="each entry point needs its own object"):
        built(runner="x", plugins=["x"])


# -------------------------------------------------------------------------------------- creating


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise OSError('no disk')", "plugin runners:x@acme failed in create_runner: OSError: no disk"),
        ("return {}", "create_runner returned a dict, not a runner that derives from nanovllm.runner.ModelRunner"),
        ("return None", "create_runner returned a NoneType, not a runner"),
        ("from nanovllm.errors import ModelError; raise ModelError('no weights')", "no weights"),
    ],
)
def test_what_create_runner_may_do_wrong(install: Install, body: str, says: str) -> None:
    source = runner_module(f"@hookimpl\n    def create_runner(self, ctx):\n        {body}")
    install("acme", {"nanovllm.runners": "x = acme_x:plugin"}, acme_x=source)
    with pytest.raises(NanoVLLMError) as caught:
        built(runner="x")
    assert says in str(caught.value)
    assert type(caught.value) is (ModelError if says == "no weights" else PluginError)


def test_a_plugin_without_the_hook_of_its_kind(install: Install) -> None:
    install("acme", {"nanovllm.runners": "x = acme_x:plugin"}, acme_x=runner_module("pass"))
    with pytest.raises(PluginError, match="plugin runners:x@acme does not implement create_runner"):
        built(runner="x")


def test_a_tokenizer_that_is_none(install: Install) -> None:
    source = runner_module("@hookimpl\n    def create_tokenizer(self, ctx):\n        return 'abc'")
    install("acme", {"nanovllm.tokenizers": "x = acme_x:plugin"}, acme_x=source)
    with pytest.raises(PluginError, match="returned a str, not a tokenizer with vocab_size, eos_ids, decode,"):
        built(runner="mock", tokenizer="x")


def test_mock_takes_everything_it_is_given() -> None:
    parts = built(
        runner={"type": "mock", "seed": 7, "script": {"tokens": [5, 6]}}, max_num_seqs=3, max_model_len=99,
        cache={"block_size": 4, "num_blocks": 50},
    )  # fmt: skip
    info = parts.runner.info
    assert isinstance(parts.tokenizer, SimpleBPETokenizer)
    assert (info.vocab_size, info.max_num_seqs, info.max_model_len) == (125, 3, 99)  # C9
    assert (info.kv.block_size, info.kv.num_blocks) == (4, 50)
    assert built(runner={"type": "mock", "vocab_size": 300}).runner.info.vocab_size == 300
    with LLM.from_components(parts.runner, parts.tokenizer) as llm:
        assert llm.generate("a", SamplingParams(temperature=0, max_tokens=2))[0].token_ids == [5, 6]


def test_the_mock_script_in_yaml_is_the_script() -> None:
    assert set(MockScript.model_fields) == set(Script.__dataclass_fields__)
    Script(**MockScript().model_dump())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            {"runner": {"type": "mock", "sede": 1}},
            "unknown key 'runner.sede' (argument); did you mean 'seed'?",
        ),
        ({"runner": {"type": "mock", "script": {"delai": 1}}}, "runner.script.delai: Extra inputs are not permitted"),
        ({"runner": {"type": "mock", "seed": "x"}}, "runner.seed: should be a valid integer, not 'x' (argument)"),
        ({"runner": "mock", "tokenizer": {"type": "simple", "x": {"y": 1}}}, "unknown key 'tokenizer.x' (argument)"),
        ({"runner": "mock", "sampler": "torch"}, "runner 'mock' cannot take sampler 'torch'"),
        ({"runner": "mock", "sampler": {"type": "numpy", "x": 1}}, "unknown key 'sampler.x' (argument)"),
    ],
)
def test_sections_are_checked_by_the_chosen_plugin(overrides: dict, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(**overrides)
    assert says in str(caught.value)


REMOTE = """
from nanovllm.batch import Remote, RunnerInfo
from nanovllm.hookspecs import hookimpl
from nanovllm.runner import ModelRunner

closed = []

class Runner(ModelRunner):
    info = RunnerInfo(vocab_size=None, max_model_len=64, max_num_seqs=2, kv=Remote(), tokenizes={tokenizes})

    def execute(self, batch):
        return []

    def close(self):
        closed.append(self)

class Plugin:
    api_version = 1

    @hookimpl
    def create_runner(self, ctx):
        return Runner()

plugin = Plugin()
"""


def test_a_runner_that_tokenizes_needs_no_tokenizer_and_no_sampler(install: Install) -> None:
    install("acme", {"nanovllm.runners": "far = acme_far:plugin"}, acme_far=REMOTE.format(tokenizes=True))
    parts = components.build(load(environ={}, overrides={"runner": "far", "model": "some-served-model"}))
    assert (parts.tokenizer, parts.sampler) == (None, None)
    with pytest.raises(ConfigError, match="runner 'far' draws tokens by itself and takes no sampler 'numpy'"):
        built(runner="far", sampler="numpy")


def test_a_later_failure_closes_the_runner(install: Install) -> None:
    install("acme", {"nanovllm.runners": "far = acme_far:plugin"}, acme_far=REMOTE.format(tokenizes=False))
    with pytest.raises(ConfigError, match="runner 'far' needs a tokenizer, and model 'nothing-there' has no files"):
        components.build(load(environ={}, overrides={"runner": "far", "model": "nothing-there"}))
    assert len(sys.modules["acme_far"].closed) == 1


OBSERVER = """
from nanovllm.hookspecs import hookimpl

class Plugin:
    api_version = 1

    def __init__(self):
        self.seen = []

    @hookimpl
    def on_request(self, event):
        self.seen.append(type(event).__name__)

    @hookimpl
    def on_step(self, stats):
        self.seen.append(type(stats).__name__)
        {on_step}

    @hookimpl
    def on_output(self, output):
        self.seen.append(type(output).__name__)

plugin = Plugin()
"""


def test_observers_named_in_plugins_see_everything(install: Install) -> None:
    install("acme", {"nanovllm.observers": "watch = acme_w:plugin"}, acme_w=OBSERVER.format(on_step=""))
    with LLM(runner="mock", plugins=["watch"]) as llm:
        llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))
    assert sys.modules["acme_w"].plugin.seen == ["Ticket", "StepStats", "Completion", "StepStats"]


def test_each_of_two_observers_is_called_once(install: Install) -> None:
    modules = {f"acme_{x}": OBSERVER.format(on_step="") for x in "ab"}
    install("acme", {"nanovllm.observers": "a = acme_a:plugin\nb = acme_b:plugin"}, **modules)
    with LLM(runner="mock", plugins=["a", "b"]) as llm:
        llm.generate("a", SamplingParams(max_tokens=1, ignore_eos=True))
    for module in modules:
        assert sorted(sys.modules[module].plugin.seen) == ["Completion", "StepStats", "Ticket"]


def test_an_observer_that_raises_is_logged_once_and_detached(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("acme", {"nanovllm.observers": "watch = acme_w:plugin"}, acme_w=OBSERVER.format(on_step="raise KeyError"))
    with LLM(runner="mock", plugins=["watch"]) as llm:
        assert len(llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
    assert sys.modules["acme_w"].plugin.seen == ["Ticket", "StepStats"]
    assert [r.getMessage() for r in caplog.records] == [
        "observer observers:watch@acme failed in on_step and is detached"
    ]


def test_two_engines_have_plugins_of_their_own() -> None:
    with LLM(runner={"type": "mock", "seed": 1}) as one, LLM(runner={"type": "mock", "seed": 2}) as two:
        params = SamplingParams(temperature=0, max_tokens=8)
        first, second = one.generate("a b", params)[0].text, two.generate("a b", params)[0].text
        assert first != second
        assert one.generate("a b", params)[0].text == first


# ---------------------------------------------------------------------------------------- the docs


def test_the_plugin_of_the_docs_works(install: Install) -> None:
    page = (REPO / "docs" / "plugins.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert 'echo = "nanovllm_echo:plugin"' in page
    install("nanovllm-echo", {"nanovllm.runners": "echo = nanovllm_echo:plugin"}, nanovllm_echo=source)
    with LLM(runner={"type": "echo", "times": 2}, tokenizer="simple", max_num_batched_tokens=4, max_num_seqs=2) as llm:
        outputs = llm.generate(["the word ", "a "], SamplingParams(temperature=0))
        assert [o.text for o in outputs] == ["the word the word ", "a a "]
    with pytest.raises(ConfigError, match=r"runner\.times: should be greater than or equal to 1, not 0"):
        built(runner={"type": "echo", "times": 0})


# ------------------------------------------------------------------------------------- checkpoints


def test_a_registered_name_wins_over_a_directory(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "acme_models"
    (package / "tiny").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "tiny" / "__init__.py").write_text("raise RuntimeError('never imported')")
    install("acme", {"nanovllm.checkpoints": "tiny = acme_models.tiny\ngone = acme_models.gone"})
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert plugins.resolve_model("tiny") == ("tiny", package / "tiny")
    assert plugins.resolve_model("tiny@acme") == ("tiny@acme", package / "tiny")
    assert plugins.resolve_model("./tiny") == ("./tiny", tmp_path / "tiny")
    with pytest.raises(PluginError, match=r"checkpoint 'gone' of acme names no package: acme_models\.gone"):
        plugins.resolve_model("gone")


def test_models_that_are_paths_or_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert plugins.resolve_model("~/model.onnx")[1] == tmp_path / "model.onnx"
    assert plugins.resolve_model("some/served-name") == ("some/served-name", None)
    assert plugins.resolve_model(str(tmp_path))[1] == tmp_path
    for name in ("a\0b", "x" * 5000, "~no-such-user-here/m"):
        try:
            assert plugins.resolve_model(name)[1] is None  # some systems only say that there is no such file
        except ModelError as e:
            assert "cannot be read" in str(e)  # noqa: PT017


# ------------------------------------------------------------------------------------ import budget


HEAVY = ["numpy", "pydantic", "yaml", "rich", "pluggy", "torch", "tokenizers", "jinja2", "nanovllm_models"]


@pytest.mark.parametrize(
    "program",
    [
        "import nanovllm",
        "from nanovllm.cli import main; sys.argv = ['nanovllm', '--help']; main()",
        "from nanovllm.cli import main; sys.argv = ['nanovllm', 'plugins', 'list']; main()",
    ],
)
def test_nothing_heavy_is_imported_to_start_or_to_list(program: str) -> None:
    report = f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    program = f"import atexit, sys; atexit.register(lambda: {report}); {program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
