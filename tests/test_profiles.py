"""examples/scenarios.yaml: five places to run. Each is valid to the last key, serves, and answers where it can run."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from app_support import serve_command
from nanovllm import LLM, ConfigError, SamplingParams
from nanovllm.components import choose
from nanovllm.config import load
from nanovllm_server.options import ServerOptions, server_options
from support import REPO

SCENARIOS = REPO / "examples" / "scenarios.yaml"
NAMES = ("raspberry-pi", "cpu-cloud", "a100", "docker", "desktop")
KEY = "a-key-of-sixteen-letters-or-more"


def test_there_are_five_and_each_is_a_place_of_its_own() -> None:
    assert load(SCENARIOS, environ={}).profiles == NAMES
    sizes = {name: load(SCENARIOS, environ={}, overrides={"profile": name}).config for name in NAMES}
    assert len({(c.scheduler.max_num_seqs, c.cache.memory) for c in sizes.values()}) == 5
    assert max(NAMES, key=lambda name: sizes[name].scheduler.max_num_seqs) == "a100"
    assert min(NAMES, key=lambda name: sizes[name].scheduler.max_num_seqs) == "raspberry-pi"


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_one_that_its_plugin_and_the_server_know(name: str) -> None:
    loaded = load(SCENARIOS, environ={}, overrides={"profile": name})
    choose(loaded, None)
    assert server_options(loaded, {}) != ServerOptions(), "a scenario says something about serving"
    for wrong in ({"runner.thread": 1}, {"scheduler.max_seqs": 1}):
        with pytest.raises(ConfigError):
            choose(load(SCENARIOS, environ={}, overrides={"profile": name, **wrong}), None)
    with pytest.raises(ConfigError, match="max_queu"):
        server_options(load(SCENARIOS, environ={}, overrides={"profile": name, "server.max_queu": 1}), {})


@pytest.mark.parametrize("name", NAMES)
def test_it_serves_with_a_model_without_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    words = ["serve", "--config", str(SCENARIOS), "--profile", name, "--runner", "mock", "--port", "0"]
    headers = {}
    if name == "docker":  # the only one that other machines reach
        words += ["--api-key-file", "keys"]
        headers = {"Authorization": f"Bearer {KEY}"}
    with serve_command(tmp_path, *words, what="demo (mock) at http://") as url:
        assert ("0.0.0.0" in url) == (name == "docker")
        body = {"prompt": "hello world", "max_tokens": 3, "ignore_eos": True}
        answer = requests.post(
            f"{url.replace('0.0.0.0', '127.0.0.1')}/v1/completions", json=body, headers=headers, timeout=20
        )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a100"])
def test_it_answers_with_its_own_runner(name: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM.from_config(SCENARIOS, profile=name) as llm:
        [answer] = llm.chat([{"role": "user", "content": "What is the capital of Peru?"}], params)
    assert "Lima" in answer.text


def test_without_its_gpu_the_scenario_of_the_data_centre_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match="cuda"):
        LLM.from_config(SCENARIOS, profile="a100")
