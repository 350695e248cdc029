"""Workloads: the draws of nano-vllm, files good and broken, and what a model is too small for."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from nanovllm.bench.workload import PRESETS, Drawn, Job, Workload, read
from nanovllm.errors import ConfigError, RequestError
from support import REPO

SHARED = REPO.parent / "shared" / "bench" / "workload.json"


def test_the_preset_draws_what_nano_vllms_bench_draws() -> None:
    workload = PRESETS["nano-vllm"].workload(151_936, 40_960)
    assert (len(workload.jobs), workload.num_output_tokens) == (256, 133_966)  # as its README reports
    # Its script, statement by statement, on Python's own generator.
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    outputs = [random.randint(100, 1024) for _ in range(256)]
    assert [(list(job.prompt), job.num_tokens) for job in workload.jobs] == list(zip(prompts, outputs, strict=True))


def test_draws_depend_on_the_seed_and_on_nothing_else() -> None:
    state = random.getstate()
    first, again, other = (Drawn(seed=s).workload(500, 1000) for s in (1, 1, 2))
    assert first == again != other
    assert random.getstate() == state
    for job in first.jobs:
        assert 20 <= len(job.prompt) <= 215
        assert 24 <= job.num_tokens <= 107
        assert all(0 <= i < 500 for i in job.prompt)


@pytest.mark.parametrize(("max_len", "lengths"), [(4096, (512, 32)), (100, (99, 32)), (70, (69, 5)), (65, (64, None))])
def test_the_single_stream_prompts_fit_the_model(max_len: int, lengths: tuple[int, int | None]) -> None:
    workload = Drawn(num_requests=1, input_len=(1, 1), output_len=(1, 1)).workload(None, max_len)
    assert workload.prefill is not None
    assert len(workload.prefill) == lengths[0]
    assert (None if workload.decode is None else len(workload.decode)) == lengths[1]
    workload.check(None, max_len)


@pytest.mark.skipif(not SHARED.is_file(), reason="needs ../shared/bench beside the repository")
def test_the_shared_workload_is_read() -> None:
    workload = read(SHARED)
    assert (len(workload.jobs), workload.num_prompt_tokens, workload.num_output_tokens) == (32, 4669, 2581)
    assert workload.prefill is not None
    assert workload.decode is not None
    assert (len(workload.prefill), len(workload.decode)) == (512, 32)


def test_a_file_without_single_stream_prompts_has_none(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"requests": [{"prompt": [1, 2], "out": 3}]}), encoding="utf-8")
    assert read(path) == Workload(name="w.json", jobs=(Job((1, 2), 3),), prefill=None, decode=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no list `requests`"),
        ('{"requests": []}', "has no list `requests`"),
        ('{"requests": [7]}', r"requests\[0\] is not an object"),
        ('{"requests": [{"prompt": [1], "out": 0}]}', r"requests\[0\]\.out must be a whole number from 1, not 0"),
        ('{"requests": [{"prompt": [1], "out": true}]}', r"requests\[0\]\.out"),
        ('{"requests": [{"prompt": [1]}]}', r"requests\[0\]\.out"),
        ('{"requests": [{"prompt": [1], "out": 1}, {"out": 1}]}', r"requests\[1\]\.prompt must be a list"),
        ('{"requests": [{"prompt": [1, "a"], "out": 1}]}', r"requests\[0\]\.prompt must hold token ids only, not 'a'"),
        ('{"requests": [{"prompt": [-1], "out": 1}]}', "must hold token ids only, not -1"),
        ('{"requests": [{"prompt": [1], "out": 1}], "p512": []}', "p512 must be a list of token ids"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^workload .*broken.json.*{message}"):
        read(path)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not JSON"):
        read(tmp_path / "bytes.json")


def test_a_model_that_is_too_small_is_refused_with_the_numbers() -> None:
    jobs = (Job((1, 2), 2), Job((1, 9, 3), 4))
    workload = Workload(name="w", jobs=jobs, prefill=(1,) * 12, decode=None)
    workload.check(10, 13)
    with pytest.raises(RequestError, match=r"request 1 of workload w: 3 prompt tokens and 4 new ones .* the 6 "):
        workload.check(10, 6)
    with pytest.raises(RequestError, match="the prefill prompt of workload w: 12 prompt tokens and 1 new ones"):
        workload.check(10, 12)
    with pytest.raises(RequestError, match=r"request 1 of workload w holds the token id 9, .* has 9 entries"):
        workload.check(9, 100)
