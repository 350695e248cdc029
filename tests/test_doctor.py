"""`nanovllm doctor`: the core's checks, each on a planted fault that it must name with its fix; and the command."""

from __future__ import annotations

import base64
import colorsys
import hashlib
import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import nanovllm.plugins
from nanovllm import __version__
from nanovllm.cli import cli
from nanovllm.config import load
from nanovllm.doctor import (
    Case,
    Finding,
    advisories,
    distributions,
    engine,
    environment,
    examination,
    keep_busy,
    machine,
)
from nanovllm.doctor.apart import examine_apart
from nanovllm.doctor.busy import Busy, tell_threads
from nanovllm.doctor.child import MAX_FINDINGS
from nanovllm.doctor.gpus import nvidia_gpus
from nanovllm.plugins import Found, discover
from site_of_fakes import Install, fake_site
from support import REPO
from test_threads import tree

NOTHING = Case(None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not measured needs no half a second of work."""
    monkeypatch.setattr(keep_busy, "__defaults__", (0.05,))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "site"


@pytest.fixture
def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from fake_site(site, monkeypatch)


def case(**overrides: Any) -> Case:
    return Case(load(overrides=overrides, environ={}))


def wrong(findings: Iterator[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level in ("warning", "error")]


# ------------------------------------------------------------------------------------------ machine


def test_the_machine_is_described() -> None:
    texts = [finding.text for finding in machine.examine(NOTHING)]
    assert texts[0].startswith(f"CPython {sys.version_info[0]}.{sys.version_info[1]}.")
    assert f"{os.cpu_count()} processors" in texts[1]


def test_more_threads_than_the_quota_allows_are_a_warning(tmp_path: Path) -> None:
    root = tree(tmp_path, "0::/\n", {"cpu.max": "150000 100000"})
    [finding] = [f for f in machine.examine(case(**{"runner.threads": 3}), root) if f.level == "warning"]
    assert "a quota of 1.5; runner.threads is 3" in finding.text
    assert finding.fix == "--set runner.threads=1"
    [text] = [f.text for f in machine.examine(NOTHING, root) if "quota of 1.5" in f.text]
    assert text.endswith("threads to use: 1")


def memory(group: str, limit: str, used: str, stat: str, *names: str) -> dict[str, str]:
    """The files of a control group with these numbers."""
    most, now = names or ("max", "current")
    return {f"{group}memory.{most}": limit, f"{group}memory.{now}": used, f"{group}memory.stat": stat}


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        ("0::/\n", {}, 8 * 2**30),
        ("0::/a\n", memory("a/", "1000000", "400000", "inactive_file 100\nother 5"), 600100),
        ("0::/a\n", memory("a/", "max", "400000", "inactive_file 100"), 8 * 2**30),
        ("0::/a\n", memory("a/", "5", "7", "inactive_file 0"), 0),
        (
            "3:memory:/j\n",
            memory("memory/j/", "9000", "4000", "total_inactive_file 1", "limit_in_bytes", "usage_in_bytes"),
            5001,
        ),
    ],
)
def test_free_memory_is_what_system_and_container_leave(
    membership: str, files: dict[str, str], free: int, tmp_path: Path
) -> None:
    root = tree(tmp_path, membership, files)
    (root / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    assert machine.free_memory(root) == free


def test_a_system_that_tells_no_memory_is_not_guessed_about(tmp_path: Path) -> None:
    assert machine.free_memory(tmp_path) is None
    assert any("does not tell how much memory" in f.text for f in machine.examine(NOTHING, tmp_path))


def fake_nvidia(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A driver's program of that name, first on PATH."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(sys.platform == "win32", reason="the driver's program is played by a shell script")
def test_gpus_are_what_the_driver_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia(tmp_path, monkeypatch, 'echo "NVIDIA T4, 7.5, 570.86"; echo "NVIDIA A100, 8.0, 570.86"')
    assert [str(gpu) for gpu in nvidia_gpus()] == [
        "NVIDIA T4 (compute capability 7.5, driver 570.86)",
        "NVIDIA A100 (compute capability 8.0, driver 570.86)",
    ]
    assert any("GPU NVIDIA T4" in finding.text for finding in machine.examine(NOTHING))
    fake_nvidia(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert nvidia_gpus() == []


# --------------------------------------------------------------------------------------------- busy


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_are_counted_by_their_work(num_threads: int) -> None:
    data, barrier = bytes(2**20), threading.Barrier(num_threads)  # without it, one might do the other's part

    def work(_: int) -> None:
        for _ in range(20):
            barrier.wait()
            hashlib.sha256(data)

    with ThreadPoolExecutor(num_threads) as pool:
        busy = keep_busy(lambda: list(pool.map(work, range(num_threads))), 0.3)
    assert busy.seconds >= 0.3
    assert busy.processor_seconds > 0
    assert busy.num_threads == (num_threads if sys.platform == "linux" else None)


@pytest.mark.parametrize(
    ("busy", "wanted", "level"),
    [
        (Busy(1.0, 1.9, 2), 2, "ok"),
        (Busy(1.0, 0.9, 2), 2, "ok"),  # others use the processors
        (Busy(1.0, 1.0, 1), 2, "note"),
        (Busy(1.0, 0.0, 0), 2, "note"),
        (Busy(1.0, 1.0, 1), 1, "ok"),
        (Busy(1.0, 1.0, None), 2, "note"),
        (Busy(1.0, 1.9, None), 2, "ok"),
    ],
)
def test_what_is_said_about_threads(busy: Busy, wanted: int, level: str) -> None:
    finding = tell_threads("work", busy, wanted)
    assert finding.level == level
    assert f"{busy.processors:.1f} processors busy" in finding.text


# ------------------------------------------------------------------------------------ distributions


def test_what_is_installed_here_has_no_fault() -> None:
    findings = list(distributions.examine(NOTHING))
    assert f"nanovllm {__version__}" in findings[0].text
    assert [finding for finding in findings if finding.level == "error"] == []


@pytest.mark.parametrize("trace", ["name", "RECORD", "top_level.txt"])
def test_another_project_with_our_import_name_is_an_error(trace: str, install: Install, site: Path) -> None:
    name = "nano-vllm" if trace == "name" else "other"
    install(name, {}, version="0.2")
    info = site / f"{name.replace('-', '_')}-0.2.dist-info"
    if trace == "RECORD":
        (info / "RECORD").write_text("nanovllm/__init__.py,,\nnanovllm/llm.py,,\n")
    elif trace == "top_level.txt":
        (info / "top_level.txt").write_text("nanovllm\n")
    [finding] = wrong(distributions.examine(NOTHING))
    assert finding.level == "error"
    assert f"{name} 0.2 is another project with the same import name" in finding.text
    assert finding.fix == f"pip uninstall -y {name} && pip install --force-reinstall --no-deps nanovllm"


@pytest.mark.parametrize(
    ("requires", "says", "fix"),
    [
        ("nanovllm>=99", f"acme 1.0 needs nanovllm>=99, and {__version__} is installed", "pip install 'nanovllm>=99'"),
        ("unheard-of>=1", "acme 1.0 needs unheard-of>=1, and it is not installed", "pip install 'unheard-of>=1'"),
        ("unheard-of; extra == 'x'", None, None),
        ("unheard-of; python_version < '3'", None, None),
    ],
)
def test_requirements_that_are_not_met(requires: str, says: str | None, fix: str | None, install: Install) -> None:
    install("acme", {"nanovllm.runners": "x = acme_x:plugin"}, requires=requires)
    assert [(f.level, f.text, f.fix) for f in wrong(distributions.examine(NOTHING))] == (
        [("error", says, fix)] if says else []
    )


def test_names_that_clash(install: Install) -> None:
    install(
        "acme-a", {"nanovllm.runners": "dup = a:p", "nanovllm.samplers": "numpy = a:s", "nanovllm.doctors": "d = a:d"}
    )
    install("acme-b", {"nanovllm.runners": "dup = b:p", "nanovllm.doctors": "d = b:d"})
    found = {f.text: f for f in distributions.examine(NOTHING) if "offered by" in f.text}
    clash = found["runner 'dup' is offered by acme-a and acme-b, so the name alone is refused"]
    assert (clash.level, clash.fix) == ("warning", "write dup@acme-a to choose, or uninstall one")
    assert [f.level for text, f in found.items() if "sampler" in text] == ["note"]
    assert not any("health check" in text for text in found)


def test_files_that_are_not_those_that_were_installed(install: Install, site: Path) -> None:
    install("acme", {"nanovllm.runners": "x = acme_x:plugin"}, acme_x="plugin = 1", acme_y="same = 1", acme_z="")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"same = 1").digest()).rstrip(b"=").decode()
    lines = [f"acme_{letter}.py,sha256={digest},8" for letter in "xy"]
    (site / "acme-1.0.dist-info" / "RECORD").write_text("\n".join([*lines, "acme-1.0.dist-info/RECORD,,"]))
    [finding] = wrong(distributions.examine(NOTHING))
    assert finding.text == "acme: acme_x.py is not what was installed"
    assert finding.fix == "pip install --force-reinstall --no-deps acme==1.0"


def test_a_distribution_that_is_installed_twice(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme", {"nanovllm.runners": "x = acme_x:plugin"})
    for again in fake_site(tmp_path / "other", monkeypatch):
        again("acme", {"nanovllm.runners": "x = acme_x:plugin"}, version="2.0")
        twice = [f for f in wrong(distributions.examine(NOTHING)) if "2 times" in f.text]
    assert [f.text.split(":")[0] for f in twice] == ["acme is installed 2 times"]
    assert [f.fix for f in twice] == ["pip uninstall acme"]


def test_what_pip_left_of_a_distribution_is_no_obstacle(install: Install, site: Path) -> None:
    (site / "remains-1.0.dist-info").mkdir()
    assert wrong(distributions.examine(NOTHING)) == []


def test_what_is_not_installed_is_a_note_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(nanovllm.plugins._OFFICIAL, ("runners", "levitation"), "nanovllm[levitation]")
    assert Finding("note", "not installed: runner levitation", "pip install 'nanovllm[levitation]'") in list(
        distributions.examine(NOTHING)
    )


# --------------------------------------------------------------------------------------- advisories


@pytest.mark.parametrize("advisory", advisories.TABLE, ids=lambda advisory: advisory.distribution)
def test_a_version_with_a_known_fault_is_named(advisory: advisories.Advisory, install: Install) -> None:
    install(advisory.distribution, {}, version="0.0.1")
    [finding] = wrong(advisories.examine(NOTHING))
    assert f"{advisory.distribution} 0.0.1 has {advisory.ids}: {advisory.matters}" == finding.text
    assert finding.fix == f"pip install --upgrade '{advisory.distribution}>={advisory.first_fixed}'"


def test_the_first_fixed_version_is_fixed(install: Install) -> None:
    for advisory in advisories.TABLE:
        install(advisory.distribution, {}, version=advisory.first_fixed)
    assert [f.level for f in advisories.examine(NOTHING)] == ["ok"]


def test_the_page_has_the_table() -> None:
    page = (REPO / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = [" | ".join(advisory) for advisory in advisories.TABLE]
    assert re.findall(r"^\| (.+CVE-.+) \|$", page, re.MULTILINE) == rows
    assert f"**{advisories.TABLE_DATE}**" in page


# -------------------------------------------------------------------------------------- environment


def told(environ: Mapping[str, str], case: Case = NOTHING) -> list[tuple[str, str, str | None]]:
    return [(f.level, f.text, f.fix) for f in environment.examine(case, environ)]


def test_no_variable_is_needed() -> None:
    assert [level for level, _, _ in told({"PATH": "/bin", "HOME": "/"})] == ["ok"]


def test_libraries_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "libonnxruntime.so.1.16.0").touch()
    (tmp_path / "empty").mkdir()
    for entry, level, says in (
        (str(tmp_path), "warning", f"brings libonnxruntime.so.1.16.0 of {tmp_path} before those that pip installed"),
        (str(tmp_path / "empty"), "note", "with no library that is used here"),
        (str(tmp_path / "absent"), "note", "which cannot be read: No such file or directory"),
        ("", "warning", "from wherever you are"),
    ):
        (first, text, fix), *_ = told({"LD_LIBRARY_PATH": os.pathsep.join([entry, str(tmp_path / "absent")])})
        assert first == level
        assert says in text
        assert fix == (f"remove {entry or 'the empty entry'} from LD_LIBRARY_PATH" if level == "warning" else None)
    assert told({"LD_PRELOAD": "libx.so"}) == [("note", "LD_PRELOAD loads 'libx.so' into every program", None)]


def test_modules_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"PYTHONPATH": str(tmp_path)}
    monkeypatch.syspath_prepend(str(tmp_path))
    assert told(environ) == [("note", f"PYTHONPATH names {tmp_path}, and hides no module that is used here", None)]
    (tmp_path / "yaml.py").touch()
    importlib.invalidate_caches()
    assert told(environ) == [("warning", "PYTHONPATH brings yaml before what pip installed", "unset PYTHONPATH")]


def test_variables_that_set_threads_devices_and_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "available_threads", lambda: 4)
    text = "OMP_NUM_THREADS='1': threads of a library that is told nothing else; this process may use 4"
    assert told({"OMP_NUM_THREADS": "1"}) == [("note", text, None)]
    assert told({"CUDA_VISIBLE_DEVICES": ""}) == [("note", "CUDA_VISIBLE_DEVICES='': libraries see no other GPU", None)]
    assert told({"NANOVLLM_RUNNER__TYPE": "mock", "MODEL_PATH": "x", "NANOVLLM_API_KEY": "secret"}) == [
        ("note", "MODEL_PATH sets model of the configuration", None),
        ("note", "NANOVLLM_RUNNER__TYPE sets runner.type of the configuration", None),
    ]
    assert "secret" not in str(told({"HTTPS_PROXY": "http://me:secret@proxy"}))


# -------------------------------------------------------------------------------- checks of plugins


FIRST_SAY_SOMETHING = ("crashes", "crashes_beside_another_thread", "exits", "raises")
CHECKS = """
import ctypes, os, subprocess, sys, threading, time
from nanovllm.doctor import Finding
from nanovllm.errors import ModelError

def well(case):
    yield Finding("ok", f"configured: {case.loaded and case.loaded.config.runner.type}")

def hangs(case):
    yield Finding("ok", "before")
    time.sleep(60)

def crashes(case):
    yield Finding("ok", "before")
    ctypes.string_at(0)

def leaves(case):
    os._exit(3)

def raises(case):
    yield Finding("ok", "before")
    1 / 0

def refuses(case):
    raise ModelError("the model is broken", hint="download it again")
    yield

def prints(case):
    print("hello")
    os.write(1, b"from below")
    yield Finding("ok", "after")

def nonsense(case):
    yield "not a finding"

def misjudges(case):
    yield Finding("fatal", "x")

def numbers(case):
    yield Finding("ok", 3)

def exits(case):
    yield Finding("ok", "before")
    sys.exit(0)

def killed(case):
    os.kill(os.getpid(), 9)
    yield

def crashes_beside_another_thread(case):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    yield from crashes(case)

def leaks(case):
    raise RuntimeError("cannot reach http://me:secret@host/x today")
    yield

def babbles(case):
    while True:
        yield Finding("note", "and another thing")

def leaves_a_child(case):
    program = "import sys, time; fifo = open(sys.argv[1], 'w'); time.sleep(20); fifo.write('alive')"
    subprocess.Popen([sys.executable, "-c", program, os.environ["FIFO"]])
    yield from hangs(case)

def imports(case):
    import colorsys
    yield Finding("ok", colorsys.__file__)
"""


def apart(install: Install, name: str, case: Case = NOTHING, timeout: float = 20) -> list[tuple[str, str, str | None]]:
    install("acme", {"nanovllm.doctors": f"{name} = acme_checks:{name}"}, acme_checks=CHECKS)
    found = Found("doctors", name, "acme", "1.0", f"acme_checks:{name}")
    return [(f.level, f.text, f.fix) for f in examine_apart(found, case, timeout)]


def test_a_check_gets_the_configuration(install: Install) -> None:
    assert apart(install, "well", case(runner="mock", **{"runner.seed": 3})) == [("ok", "configured: mock", None)]


def test_a_check_without_a_configuration(install: Install) -> None:
    assert apart(install, "well") == [("ok", "configured: None", None)]


@pytest.mark.parametrize(
    ("name", "says", "fix"),
    [
        ("crashes", "it ended the process with SIGSEGV: in string_at, ", "pip install --force-reinstall acme"),
        ("crashes_beside_another_thread", "SIGSEGV: in string_at, ", "pip install --force-reinstall acme"),
        ("killed", "it ended the process with SIGKILL", "the system does that when memory runs out"),
        ("leaves", "it ended the process with status 3", "repair it with: pip install --force-reinstall acme"),
        ("exits", "it ended the process with status 0", "repair it with: pip install --force-reinstall acme"),
        ("raises", "this check failed: ZeroDivisionError: division by zero", "report it to the authors of acme"),
        ("refuses", "the model is broken", "download it again"),
        ("nonsense", "it gave 'not a finding', which is no Finding", "report it to the authors of acme"),
        ("misjudges", "ValueError: the level of a finding is 'fatal', not one of ok, ", "report it to the authors"),
        ("numbers", "TypeError: a finding has strings, not 3", "report it to the authors of acme"),
        ("absent", "cannot be imported: AttributeError", "repair it with: pip install --force-reinstall acme"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSEGV there")
def test_whatever_a_check_does_is_a_finding(name: str, says: str, fix: str, install: Install) -> None:
    *before, (level, text, remedy) = apart(install, name)
    assert before == [("ok", "before", None)] * (name in FIRST_SAY_SOMETHING)
    assert level == "error"
    assert says in text
    assert remedy is not None
    assert fix in remedy


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes and process groups there")
def test_a_check_that_hangs_is_stopped_with_all_that_it_started(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIFO", str(tmp_path / "fifo"))
    os.mkfifo(tmp_path / "fifo")
    with open(os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)) as fifo:
        assert apart(install, "leaves_a_child", timeout=2) == [
            ("ok", "before", None),
            ("error", "it did not end within 2 seconds", "if it is only slow, give it longer: --timeout"),
        ]
        os.set_blocking(fifo.fileno(), True)
        assert fifo.read() == ""  # its end was closed, without a word


def test_a_check_that_says_too_much_is_stopped(install: Install) -> None:
    *findings, last = apart(install, "babbles")
    assert findings == [("note", "and another thing", None)] * MAX_FINDINGS
    assert last == ("warning", "its check finds more than these 100, which is where it was stopped", None)


def test_nothing_in_the_working_directory_is_imported(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("colorsys", "json", "pydantic"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger')")
    assert apart(install, "imports") == [("ok", colorsys.__file__, None)]


def test_without_a_place_for_temporary_files_that_is_the_finding(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    [(level, text, fix)] = apart(install, "well")
    assert level == "error"
    assert "no process could be started for it: FileNotFoundError" in text
    assert fix == "free some space, or set TMPDIR to a directory that can be written"


def test_a_check_that_prints_is_told(install: Install) -> None:
    after, (level, text, fix) = apart(install, "prints")
    assert after == ("ok", "after", None)
    assert level == "warning"
    assert "hello" in text
    assert "from below" in text
    assert fix is not None
    assert "authors of acme" in fix


# ------------------------------------------------------------------------------------------- engine


def test_what_an_engine_does_is_told() -> None:
    findings = list(engine.examine(case(runner="mock")))
    texts = " | ".join(finding.text for finding in findings)
    assert "demo on mock, loaded in " in texts
    assert "KV pool of 4096 blocks, 65536 tokens" in texts
    assert "tokenizer of 125 entries for the model's 125" in texts
    assert "processors busy" in texts
    assert "tokens/s of one answer" in texts
    assert [finding for finding in findings if finding.level in ("warning", "error")] == []


def test_slow_decoding_is_told_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ANSWER_TOKENS", 3)
    [finding] = wrong(engine.examine(case(runner="mock", **{"runner.script.delay": 0.11})))
    assert "which is slower than 10" in finding.text
    assert finding.fix is not None
    for advice in ("GPU", "quantised weights", "smaller model", "fewer tokens"):
        assert advice in finding.fix


FACTS = """
from nanovllm.builtin.mock import MockRunner
from nanovllm.hookspecs import hookimpl
from dataclasses import replace

DEVICE = "cpu"

class Runner(MockRunner):
    @property
    def info(self):
        about = {"device": DEVICE, "fallback": "cuda has no driver", "kv_bytes": 10**16, "weight_bytes": 10**15}
        about["threads"] = 1
        return replace(super().info, description=about)

class Plugin:
    api_version = 1
    @hookimpl
    def create_runner(self, ctx):
        return Runner(num_blocks=300)

plugin = Plugin()
"""


def test_a_fallback_and_a_pool_beyond_the_memory_are_warnings(install: Install) -> None:
    install("acme", {"nanovllm.runners": "facts = acme_facts:plugin"}, acme_facts=FACTS)
    fallback, pool = wrong(engine.examine(case(runner="facts", tokenizer="simple", **{"runner.threads": 1})))
    assert fallback.text == "it runs on cpu, and not where it should: cuda has no driver"
    assert "with the weights 11,000,000,000.0 MB, but only" in pool.text
    assert pool.fix is not None
    assert "--set cache.memory=SIZE" in pool.fix


def test_fewer_threads_than_there_could_be_are_a_warning(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "available_threads", lambda: 4)
    install("acme", {"nanovllm.runners": "facts = acme_facts:plugin"}, acme_facts=FACTS)
    *_, last = wrong(engine.examine(case(runner="facts", tokenizer="simple")))
    assert (last.text, last.fix) == ("the runner takes 1 of the 4 threads that it may use", "--set runner.threads=4")


def test_threads_are_no_matter_where_a_gpu_computes(install: Install) -> None:
    facts = FACTS.replace('DEVICE = "cpu"', 'DEVICE = "cuda:0"')
    install("acme", {"nanovllm.runners": "facts = acme_facts:plugin"}, acme_facts=facts)
    texts = [f.text for f in engine.examine(case(runner="facts", tokenizer="simple"))]
    assert not any("at work" in text or "were free" in text for text in texts)
    assert any("tokens/s" in text for text in texts)


def test_a_pool_for_less_than_two_long_sequences_is_a_note() -> None:
    notes = [f for f in engine.examine(case(runner="mock", **{"cache.num_blocks": 300})) if "KV pool" in f.text]
    assert [f.level for f in notes] == ["note"]
    assert "1.2 sequences of the full length 4096" in notes[0].text


# ------------------------------------------------------------------------------------------ command


def run(*arguments: str) -> Result:
    return CliRunner(env={"MODEL_PATH": None, "TOKENIZER_PATH": None}).invoke(cli, ["doctor", *arguments])


def test_here_nothing_is_wrong() -> None:
    result = run("-m", "demo", "-r", "numpy", "--json")
    document = json.loads(result.stdout)
    assert [f for f in document["findings"] if f["level"] == "error"] == []
    assert (result.exit_code, document["is_healthy"]) == (0, True)
    assert {frozenset(f) for f in document["findings"]} == {frozenset(["subject", "level", "text", "fix"])}
    for f in document["findings"]:
        assert f["level"] in ("ok", "note", "warning", "error")
        assert f["text"]
        assert not f["text"].endswith(".")
        assert f["fix"] is None or f["fix"]
    subjects = {f["subject"] for f in document["findings"]}
    assert subjects == {*examination.HERE, *(found.name for found in discover("doctors")), "engine"}


@pytest.fixture
def few(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checks but one that finds something wrong; and one of the core that fails by itself."""
    install("acme", {"nanovllm.doctors": "a = acme_checks:refuses"}, acme_checks=CHECKS)
    found = Found("doctors", "a", "acme", "1.0", "acme_checks:refuses")
    monkeypatch.setattr(examination, "discover", lambda group: [found])
    monkeypatch.setattr(examination, "HERE", {"here": lambda case: iter([Finding("ok", "a\x1b[2Jb")])})


def test_an_error_is_a_line_and_the_status_is_1(few: None) -> None:
    result = run()
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        r"ok       here: a\x1b[2Jb",
        "error    a: the model is broken; download it again",
        "1 error, 0 warnings",
    ]


def test_passwords_in_addresses_are_not_shown(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    leaks = Found("doctors", "a", "acme", "1.0", "acme_checks:leaks")
    monkeypatch.setattr(examination, "discover", lambda group: [leaks])
    for result in (run(), run("--json")):
        assert "cannot reach http://***@host/x today" in result.stdout
        assert "secret" not in result.stdout


def test_the_engine_is_loaded_where_one_is_configured(few: None) -> None:
    lines = run("-r", "nothing").stdout.splitlines()
    assert lines[-2].startswith("error    engine: no runner named 'nothing' is installed")
    assert lines[-1] == "2 errors, 0 warnings"


def test_a_check_of_the_core_that_fails_is_a_finding_too(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "HERE", {"here": lambda case: iter([1 / 0])})
    first = json.loads(run("--json").stdout)["findings"][0]
    assert (first["subject"], first["level"]) == ("here", "error")
    assert first["text"] == "this check failed: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--set", "runner.threads=0"], "runner.threads"),
        (["--timeout", "0"], "timeout"),
        (["--timeout", "inf"], "timeout"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_core_alone_is_healthy_and_says_what_can_be_added(environment: Any, tmp_path: Path) -> None:
    alone = environment(tmp_path)
    alone.install("nanovllm")
    document = json.loads(alone.run("nanovllm", "doctor", "-r", "mock", "--json"))
    assert document["is_healthy"]
    assert {f["subject"] for f in document["findings"]} == {*examination.HERE, "engine"}
    fixes = [f["fix"] for f in document["findings"] if f["text"].startswith("not installed: ")]
    for extra in ("numpy", "onnx", "torch", "http", "server"):
        assert f"pip install 'nanovllm[{extra}]'" in fixes
