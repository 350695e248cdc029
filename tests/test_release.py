"""What is released: the wheels of this tree, installed where nothing knows of it, do the main job."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support import REPO
from wheels_support import PROJECTS, Environment, build, call

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

QUESTION, ANSWER = "What is the capital of Peru?", "Lima"


def check_dist(dist: Path, *version: str) -> list[str]:
    spec = importlib.util.spec_from_file_location("check_dist", REPO / "scripts" / "check_dist.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.problems(dist, *version))


def project(directory: Path) -> dict[str, Any]:
    return dict(tomllib.loads((directory / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# ------------------------------------------------------------------------------------ the files


def test_there_is_a_wheel_for_every_system_and_an_sdist_of_each(wheels: Path) -> None:
    version = project(REPO)["version"]
    assert check_dist(wheels, version) == []
    assert check_dist(wheels, "9.9.9") == [f"the wheels are of version {version}, not 9.9.9"]
    names = {canonicalize_name(path.name.split("-")[0]) for path in wheels.glob("*-py3-none-any.whl")}
    assert names == {project(directory)["name"] for directory in PROJECTS}


def test_the_check_finds_what_is_wrong(wheels: Path, tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    shutil.copytree(wheels, dist)
    [wheel], [sdist] = dist.glob("nanovllm_server-*.whl"), dist.glob("nanovllm_models-*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        kept = [name for name in archive.namelist() if not name.endswith(("/LICENSE", "/door.py"))]
        files = {name: archive.read(name) for name in kept}
    version = wheel.name.split("-")[1]
    wheel.unlink()
    sdist.unlink()
    renamed = dist / "nanovllm_server-9.9.9-cp312-cp312-linux_x86_64.whl"
    with zipfile.ZipFile(renamed, "w") as archive:
        for name, data in (files | {"tests/stray.py": b""}).items():
            archive.writestr(name, data)
    assert check_dist(dist) == [
        f"the wheels are of several versions: {version}, 9.9.9",
        "nanovllm_models: 1 wheels and 0 sdists, not one of each",
        f"{renamed.name} is not for any Python 3 on any system",
        f"{renamed.name} lacks nanovllm_server/door.py",
        f"{renamed.name} carries tests/stray.py",
        f"{renamed.name} has no LICENSE",
    ]


@pytest.mark.parametrize("directory", PROJECTS, ids=lambda path: path.name if path != REPO else "core")
def test_the_sdist_builds_the_wheel_that_the_tree_builds(wheels: Path, tmp_path: Path, directory: Path) -> None:
    build(directory, tmp_path, "--wheel")
    [wheel] = tmp_path.glob("*.whl")
    assert contents(wheel) == contents(wheels / wheel.name)


# --------------------------------------------------------------------------------- installed


def test_with_numpy_it_answers_where_nothing_knows_of_this_tree(
    environment: Callable[[Path], Environment], tmp_path: Path
) -> None:
    env = environment(tmp_path)
    env.install("nanovllm[numpy]")
    version = project(REPO)["version"]
    assert env.run("nanovllm", "--version") == f"nanovllm {version}\n"
    for command in ("ask", "bench", "demo", "inspect"):
        assert re.search(rf"^  {command} ", env.run("nanovllm", "--help"), re.MULTILINE)
    listed = env.run("nanovllm", "plugins", "list")
    assert re.search(r"\bnumpy\b", listed)
    assert not re.search(r"\b(torch|onnx)\b", listed)
    assert ANSWER in env.run("nanovllm", "ask", QUESTION)
    report = json.loads(env.run("python", "-c", WHERE))
    assert set(report["versions"].values()) == {version}
    for path in (*report["sys.path"], *report["files"]):
        assert not Path(path).is_relative_to(REPO), "something is imported from the checkout"
    assert len(report["files"]) == len(report["versions"]) == 4  # the core, models, the runner, the tokenizers


WHERE = """
import importlib, importlib.metadata as m, json, sys
ours = sorted(d.name for d in m.distributions() if d.name.startswith("nanovllm"))
files = [importlib.import_module(name.replace("-", "_")).__file__ for name in ours]
print(json.dumps({"sys.path": sys.path[1:], "files": files, "versions": {name: m.version(name) for name in ours}}))
"""


def test_with_onnx_it_answers_and_there_is_one_onnx_runtime(
    environment: Callable[[Path], Environment], tmp_path: Path
) -> None:
    env = environment(tmp_path)
    env.install("nanovllm[onnx]")
    assert ANSWER in env.run("nanovllm", "ask", "--runner", "onnx", QUESTION)
    who = "import importlib.metadata as m; print(*m.packages_distributions()['onnxruntime'])"
    assert env.run("python", "-c", who).split() == ["onnxruntime"]


# ---------------------------------------------------------------------------------- workflows

WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def workflow(path: Path) -> dict[str, Any]:
    loaded = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # BaseLoader: `on` is a word
    assert isinstance(loaded, dict)
    return loaded


def test_workflows_are_what_github_s_schema_says() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    call([*command, *map(str, WORKFLOWS)], REPO)
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_calls_is_there(path: Path) -> None:
    jobs = workflow(path)["jobs"]
    called = set()
    for job in jobs.values():
        assert set([job["needs"]] if "needs" in job else []) <= set(jobs)
        assert "timeout-minutes" in job
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"])
                continue
            match shlex.split(step["run"]):
                case ["make", target, *_]:
                    assert target in TARGETS, step["run"]
                case ["python", "-m", module, *_]:
                    assert importlib.util.find_spec(module) is not None, step["run"]
                case ["python", script, *_]:
                    assert (REPO / script).is_file(), step["run"]
                case command:
                    raise AssertionError(f"{command} is not checked here")
            called.add(step["run"])
    assert called


def test_the_tests_run_on_three_systems_and_every_python_that_is_promised() -> None:
    matrix = workflow(REPO / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert {os.partition("-")[0] for os in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"][0] == project(REPO)["requires-python"].removeprefix(">=")
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]


def test_only_the_job_that_publishes_may_say_who_it_is() -> None:
    release = workflow(REPO / ".github" / "workflows" / "release.yml")
    assert release["permissions"] == {"contents": "read"}
    allowed = {name for name, job in release["jobs"].items() if job.get("permissions", {}).get("id-token") == "write"}
    assert allowed == {"publish", "site"}
    assert not any("make" in step.get("run", "") for step in release["jobs"]["publish"]["steps"]), (
        "nothing is built there"
    )
    assert "id-token" not in str(workflow(REPO / ".github" / "workflows" / "ci.yml"))


# ----------------------------------------------------------------------------------- metadata


def test_an_extra_brings_one_onnx_runtime_at_most() -> None:
    root = project(REPO)
    runner = project(REPO / "plugins" / "runner_onnx")
    assert not [r for r in runner["dependencies"] if r.startswith("onnxruntime")], "the extra chooses, not the runner"
    extras = root["optional-dependencies"]

    def runtimes(extra: str) -> Iterator[str]:
        for line in extras[extra]:
            requirement = Requirement(line)
            if requirement.name == "nanovllm":
                for more in requirement.extras:
                    yield from runtimes(more)
            elif requirement.name.startswith("onnxruntime"):
                yield requirement.name

    brought = {extra: set(runtimes(extra)) for extra in extras}
    assert {extra: names for extra, names in brought.items() if names} == {
        "onnx": {"onnxruntime"},
        "onnx-cuda": {"onnxruntime-gpu"},
        "onnx-directml": {"onnxruntime-directml"},
        "all": {"onnxruntime"},
    }


def test_all_distributions_have_one_version_and_one_promise() -> None:
    version = project(REPO)["version"]
    minor = int(version.split(".")[1])
    for directory in PROJECTS:
        facts = project(directory)
        assert facts["version"] == version
        assert facts["requires-python"] == ">=3.10"
        lines = [*facts["dependencies"], *(r for some in facts.get("optional-dependencies", {}).values() for r in some)]
        for requirement in map(Requirement, lines):
            if requirement.name.startswith("nanovllm-") or (requirement.name == "nanovllm" and not requirement.extras):
                assert {str(s) for s in requirement.specifier} == {f">=0.{minor}", f"<0.{minor + 2}"}, str(requirement)
