"""`pull` against a fake hub: what it takes, what it refuses, and what it does when the hub fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("nanovllm_models")
pytest.importorskip("huggingface_hub")

import nanovllm_models
from fake_hub import COMMIT, FakeHub, serve
from nanovllm.cli import cli

DEMO = Path(nanovllm_models.__file__).parent / "demo"
REPO = "acme/tiny-model"
CONFIG = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}" * 2000,
        "model.safetensors": WEIGHTS,
        "README.md": b"# Tiny",
        "LICENSE": b"do what you like",
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # a break loses at most one chunk
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    with serve(FakeHub(REPO, files)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def pull(*arguments: str, repo: str = REPO) -> Result:
    return CliRunner().invoke(cli, ["pull", repo, "--output", "here", *arguments])


def here() -> dict[str, bytes]:
    """What lies in the directory, by name."""
    root = Path("here")
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def fetched(hub: FakeHub) -> list[tuple[str, str | None]]:
    """(name, Range) of the files that were asked for."""
    prefix = f"/{REPO}/resolve/{COMMIT}/"
    return [(path.removeprefix(prefix), range_) for path, range_, _ in hub.requests if path.startswith(prefix)]


# -------------------------------------------------------------------------------------- what comes


def test_only_what_is_read_comes_and_every_byte_of_it(hub: FakeHub) -> None:
    wanted = dict(hub.files)
    others = [
        "pytorch_model.bin", "model.pt", "data.pkl", "modeling_tiny.py", "run.sh", "flax_model.msgpack", "tf_model.h5",
        "consolidated.safetensors", "sub/config.json", "sub/model.safetensors", "model.onnx", ".gitattributes",
    ]  # fmt: skip
    hub.files |= dict.fromkeys(others, b"x" * 1200)
    result = pull()
    assert result.exit_code == 0, result.output
    info = json.loads(here()["model_info.json"])
    assert (info["model_name"], info["vocab_size"], info["num_heads"]) == (REPO, 9, 2)
    assert here() == wanted | {"model_info.json": here()["model_info.json"]}
    assert {name for name, _ in fetched(hub)} == wanted.keys()
    assert result.stdout.splitlines()[-1] == f"here: 5 files, {sum(map(len, wanted.values())):,} bytes"
    assert result.stderr == ""


def test_again_nothing_is_fetched_but_what_differs(hub: FakeHub) -> None:
    pull()
    Path("here/README.md").write_text("changed")
    Path("here/model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")  # the same size
    hub.requests.clear()
    assert "config.json: already there" in pull().stdout
    assert sorted(fetched(hub)) == [("README.md", None), ("model.safetensors", None)]
    assert here()["model.safetensors"] == WEIGHTS


def test_shards_and_the_other_spelling_of_output(hub: FakeHub) -> None:
    del hub.files["model.safetensors"]
    hub.files |= {f"model-0000{i}-of-00002.safetensors": WEIGHTS for i in (1, 2)}
    hub.files |= {"model.safetensors.index.json": b"{}", "model_info.json": b'{"theirs": 1}'}
    assert CliRunner().invoke(cli, ["pull", REPO, "--local-dir", "here"]).exit_code == 0
    assert here() == hub.files


def test_onnx_comes_if_asked_for(hub: FakeHub) -> None:
    hub.files |= {"onnx/model.onnx": b"graph", "onnx/model.onnx_data": WEIGHTS}
    assert "onnx" not in str(pull().stdout)
    assert pull("--onnx").exit_code == 0
    assert here()["onnx/model.onnx_data"] == WEIGHTS
    assert here()["onnx/model.onnx"] == b"graph"


def test_a_pulled_model_answers(hub: FakeHub) -> None:
    pytest.importorskip("nanovllm_runner_numpy")
    hub.files = {p.name: p.read_bytes() for p in DEMO.iterdir() if p.is_file()}
    assert pull("--revision", "main").exit_code == 0
    result = CliRunner().invoke(cli, ["ask", "-m", "here", "What is the capital of France?"])
    assert "Paris" in result.stdout


# --------------------------------------------------------------------------------- what goes wrong


def test_an_interrupted_pull_goes_on_where_it_was(hub: FakeHub) -> None:
    hub.cut["model.safetensors"], hub.goes_down = 50_000, True
    result = pull()
    assert result.exit_code == 4
    assert f"error: {hub.url} answered 503 for {REPO}; run the command again: it goes on where it was" in result.stderr
    assert "model.safetensors" not in here()
    (part,) = [name for name in here() if name.endswith(".part")]
    assert here()[part] == WEIGHTS[:50_000]
    hub.is_down = False
    hub.requests.clear()
    result = pull()
    assert result.exit_code == 0
    assert fetched(hub) == [("model.safetensors", "bytes=50000-")]
    assert f"model.safetensors: {len(WEIGHTS):,} bytes, of which 50,000 were there" in result.stdout
    assert here()["model.safetensors"] == WEIGHTS
    assert part not in here()


def test_a_broken_connection_is_taken_up_again_at_once(hub: FakeHub) -> None:
    hub.cut["model.safetensors"] = 50_000
    assert pull().exit_code == 0
    assert ("model.safetensors", "bytes=50000-") in fetched(hub)
    assert here()["model.safetensors"] == WEIGHTS


def test_a_hub_that_ignores_ranges_starts_over(hub: FakeHub) -> None:
    hub.cut["model.safetensors"], hub.goes_down = 50_000, True
    pull()
    hub.is_down, hub.ignores_range = False, True
    assert pull().exit_code == 0
    assert here()["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])  # sha256 of the content, sha1 of git's blob
def test_a_damaged_file_is_never_kept(hub: FakeHub, name: str) -> None:
    hub.corrupt.add(name)
    result = pull()
    assert result.exit_code == 4
    assert f"error: {name} of {REPO} arrived damaged: its " in result.stderr
    assert not [found for found in here() if found.startswith(name)]
    hub.corrupt.clear()
    assert pull().exit_code == 0
    assert here()[name] == hub.files[name]


def test_a_part_that_someone_spoiled_is_found_out(hub: FakeHub) -> None:
    hub.cut["model.safetensors"], hub.goes_down = 50_000, True
    pull()
    (part,) = Path("here").glob("*.part")
    part.write_bytes(b"!" * 50_000)
    hub.is_down = False
    assert "arrived damaged" in pull().stderr
    assert pull().exit_code == 0
    part.write_bytes(b"!" * (len(WEIGHTS) + 1))  # longer than the file
    Path("here/model.safetensors").unlink()
    assert pull().exit_code == 0
    assert here()["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize(
    "name",
    ["../evil.onnx", "a/../../evil.onnx", "/evil.onnx", "a//evil.onnx", "..\\evil.onnx", "C:evil.onnx", "./evil.onnx",
     ".. /evil.onnx", "link/evil.onnx", "evil.onnx"],
)  # fmt: skip
def test_no_name_leads_outside_of_the_directory(hub: FakeHub, tmp_path: Path, name: str) -> None:
    Path("here").mkdir()
    Path("outside").mkdir()
    os.symlink(tmp_path / "outside", "here/link")
    os.symlink(tmp_path / "outside" / "evil.onnx", "here/evil.onnx")
    hub.files[name] = b"gotcha"
    result = pull("--onnx")
    assert result.exit_code == 4
    assert "which does not stay inside here; if a link lies there" in result.stderr
    assert list(Path("outside").iterdir()) == []
    assert not Path("evil.onnx").exists()


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub: FakeHub) -> None:
    hub.elsewhere = hub.url.replace("http://127.0.0.1", "localhost")
    assert pull().exit_code == 0
    assert here()["model.safetensors"] == WEIGHTS
    sent = [authorization for path, _, authorization in hub.requests if path.endswith("/model.safetensors")]
    assert sent == ["Bearer hf_secret", None]


def test_weights_that_would_have_to_be_unpickled_are_refused(hub: FakeHub) -> None:
    del hub.files["model.safetensors"]
    hub.files["pytorch_model.bin"] = WEIGHTS
    result = pull()
    assert result.exit_code == 4
    assert (
        "no safetensors weights, only pickled ones (pytorch_model.bin), and nothing is ever unpickled" in result.stderr
    )
    hub.files["model.onnx"] = b"graph"
    assert "add --onnx to pull those" in pull().stderr
    assert fetched(hub) == []
    assert not Path("here").exists()


def test_weights_of_another_model_in_the_directory_are_not_mixed_with_these(hub: FakeHub) -> None:
    Path("here").mkdir()
    Path("here/model-00001-of-00002.safetensors").write_bytes(b"other")
    result = pull()
    assert result.exit_code == 2
    assert f"here holds model-00001-of-00002.safetensors, which {REPO} does not have" in result.stderr
    assert len(here()) == 1


def test_a_config_that_says_too_little_leaves_model_info_away(hub: FakeHub) -> None:
    hub.files["config.json"] = b'{"model_type": "mamba"}'
    result = pull()
    assert result.exit_code == 0
    assert "no model_info.json: " in result.stdout
    assert "model_info.json" not in here()


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ((404, "RepoNotFound"), f" has no model {REPO}, or it is private; check the name, or set HF_TOKEN"),
        ((404, "RevisionNotFound"), f"{REPO} has no revision 'main'"),
        ((403, "GatedRepo"), f"{REPO} is gated; accept its terms at "),
        ((500, ""), f" answered 500 for {REPO}; run the command again"),
    ],
)
def test_a_hub_that_refuses(hub: FakeHub, refusal: tuple[int, str], says: str) -> None:
    hub.refusal = refusal
    result = pull()
    assert (result.exit_code, result.stdout) == (4, "")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "repo", ["../gpt2", "a/b/c", "/etc/passwd", "a b", "a--b", "a..b", "https://x/y", "x.git", "-o"]
)
def test_a_name_that_is_no_model_id_is_refused_before_any_request(hub: FakeHub, repo: str) -> None:
    result = CliRunner().invoke(cli, ["pull", "--output", "here", "--", repo])
    assert result.exit_code == 2
    assert "is no model id" in result.stderr
    assert hub.requests == []


def test_no_hub_no_checksums_no_network_no_library(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.hides_checksums = True
    assert "the hub gives no checksum or size for 'config.json'" in pull().stderr
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert pull().stderr == f"error: {REPO} cannot be pulled in offline mode; unset HF_HUB_OFFLINE\n"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = pull()
    assert result.exit_code == 4
    assert result.stderr.startswith("error: no answer from the hub at http://127.0.0.1:9 (ConnectError: ")
    assert result.stderr.count("\n") == 1
    for module in [m for m in sys.modules if m.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    result = pull()
    assert result.exit_code == 3
    assert result.stderr.endswith("try: pip install 'nanovllm-models[pull]'\n")
