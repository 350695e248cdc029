"""What kind of file torch wrote, told without opening it; and that none is opened in a place that nobody allowed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from models_support import LLAMA, file_tensors, write_checkpoint
from nanovllm import LLM
from nanovllm.cli import cli
from nanovllm.errors import ConfigError, ModelError, NanoVLLMError, UnsupportedModelError
from nanovllm_models import load_checkpoint
from nanovllm_models.inspect_model import inspect_model
from nanovllm_models.torch_files import KINDS, NOTE
from nanovllm_runner_torch.archive import Archive, find_archive, note_of, open_archive, torch_jit_warns_of_its_age

torch = pytest.importorskip("torch", reason="the runtime: pip install 'nanovllm[torch]'")

CPU = torch.device("cpu")


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(7, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids) @ self.table.weight.T


class Writing(torch.nn.Module):
    """TorchScript that makes a file as soon as it is opened."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = str(place)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.place, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.place = state[0]
        self.training = torch.from_file(self.place, shared=True, size=4).numel() > 4  # used, or it would not be done

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


class Pickled:
    """A pickle that makes a file as soon as it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return (Path.touch, (self.place,))


def save_script(path: Path, module: torch.nn.Module | None = None, **extra) -> Path:
    with torch_jit_warns_of_its_age():
        torch.jit.save(torch.jit.script(module or Plain()), path, **extra)
    return path


def save_program(path: Path, **extra) -> Path:
    program = torch.export.export(Plain(), (torch.zeros((2, 3), dtype=torch.int64),))
    torch.export.save(program, str(path), **extra)
    return path


def save_all(directory: Path) -> dict[str, Path]:
    directory.mkdir(exist_ok=True)
    state = Plain().state_dict()
    files = {
        "torchscript": save_script(directory / "script"),
        "pt2": save_program(directory / "program.pt2"),
        "pickle": directory / "weights",
        "old pickle": directory / "weights-old",
        "whole module": directory / "module",
    }
    torch.save(state, files["pickle"])
    torch.save(state, files["old pickle"], _use_new_zipfile_serialization=False)
    torch.save(Plain(), files["whole module"])
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("files"))


def armed_script(directory: Path, canary: Path) -> Path:
    directory.mkdir(exist_ok=True)
    path = save_script(directory / "model.pt", Writing(canary))
    canary.unlink(missing_ok=True)  # made while it was saved
    return path


def armed_program(directory: Path, canary: Path) -> Path:
    """An archive of torch.export whose weights are a pickle, as its own older versions wrote them."""
    directory.mkdir(exist_ok=True)
    whole = save_program(directory.parent / "whole.pt2")
    torch.save(Pickled(canary), directory.parent / "armed")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(directory / "model.pt2", "w") as target:
        root = source.namelist()[0].partition("/")[0]
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr(f"{root}/data/weights/model.pt", (directory.parent / "armed").read_bytes())
    return directory / "model.pt2"


# ------------------------------------------------------------------------------------ told apart


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".bin", ".zip", ""])
def test_a_program_is_known_by_what_it_holds_not_by_its_name(files, suffix, tmp_path):
    for kind in ("torchscript", "pt2"):
        (path := tmp_path / f"{kind}{suffix}").write_bytes(files[kind].read_bytes())
        archive = find_archive(path)
        assert (archive.kind, archive.path, archive.directory, archive.max_len) == (kind, path, tmp_path, None)


@pytest.mark.parametrize("kind", ["pickle", "old pickle", "whole module"])
@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".bin", ""])
def test_a_pickle_is_refused_whatever_its_name(files, kind, suffix, tmp_path):
    (path := tmp_path / f"model{suffix}").write_bytes(files[kind].read_bytes())
    with pytest.raises(UnsupportedModelError, match=r"is a pickle, .* nothing is ever unpickled here") as caught:
        find_archive(path)
    command = re.search(r"nanovllm export safetensors .*(?= \(needs nanovllm\[torch\]\))", caught.value.hint)[0]
    assert shlex.split(command)[3:] == [
        "--model", str(path), "--output", f"{tmp_path}-safetensors", "--allow-code-in", str(tmp_path),
    ]  # fmt: skip


def test_what_a_directory_holds(files, tmp_path):
    assert find_archive(tmp_path) is None
    (tmp_path / "model.pt").write_bytes(files["torchscript"].read_bytes())
    assert find_archive(tmp_path).kind == "torchscript"
    (tmp_path / "model.pt2").write_bytes(files["pt2"].read_bytes())
    with pytest.raises(ModelError, match=r"has both model.pt2 and model.pt; choose one"):
        find_archive(tmp_path)
    (tmp_path / "model.pt").unlink()
    assert find_archive(tmp_path).kind == "pt2"
    write_checkpoint(tmp_path, LLAMA)
    assert find_archive(tmp_path) is None  # its safetensors are what runs


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no file that torch writes: it begins with b''"),
        (b"\x08\x07onnx", "is no file that torch writes"),
        (b"PK\3\4 and no more", "is damaged or cut short"),
    ],
)
def test_other_files_are_refused_by_what_they_are(content, says, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(says)):
        find_archive(tmp_path)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"a/b": b""}, "a zip file that torch did not write"),
        (
            {"m/archive_format": b"pt2", "m/data/aotinductor/model/x.so": b""},
            "without an exported program called 'model'",
        ),
        ({"serialized_exported_program.json": b"{}", "version": b"8.1"}, "format before torch 2.8"),
    ],
)
def test_other_zip_files_are_refused_by_what_they_are(members, says, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    with pytest.raises(UnsupportedModelError, match=says):
        find_archive(tmp_path)


def test_the_length_that_the_exporter_noted_is_read_from_either_kind(tmp_path):
    for path in (
        save_script(tmp_path / "a.pt", _extra_files={NOTE: note_of(96)}),
        save_program(tmp_path / "b.pt2", extra_files={NOTE: note_of(96)}),
    ):
        assert find_archive(path).max_len == 96
    for note in ("[]", '{"max_length": 0}', '{"max_length": true}', "{}", "\x00"):
        with pytest.raises(ModelError, match=NOTE):
            find_archive(save_script(tmp_path / "a.pt", _extra_files={NOTE: note}))


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_compression_that_torch_lacks_is_refused_before_it_is_undone(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w", method) as file:
        file.writestr("m/archive_format", b"pt2")
    with pytest.raises(ModelError, match="m/archive_format is compressed in a way that torch does not know"):
        find_archive(tmp_path)


def test_no_more_of_a_note_is_read_than_a_note_can_have(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/constants.pkl", b"")
        file.writestr(f"m/extra/{NOTE}", b'{"max_length": 5}' + b" " * 2**28)
    tracemalloc.start()
    try:
        assert find_archive(tmp_path).max_len == 5
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pt")
    for path in (tmp_path, tmp_path / "model.pt"):
        with pytest.raises(ModelError, match="not a regular file"):
            find_archive(path)


@settings(deadline=None)
@given(st.sampled_from(["torchscript", "pt2", "pickle", "old pickle"]), st.data())
def test_a_damaged_file_is_judged_or_refused_and_nothing_else(files, kind, data):
    content = bytearray(files[kind].read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    with tempfile.TemporaryDirectory() as place:
        (path := Path(place) / "model.pt").write_bytes(content)
        archive = None
        with suppress(ModelError):
            archive = find_archive(path)
        assert archive is None or archive.kind == kind
        assert list(Path(place).iterdir()) == [path]


# ---------------------------------------------------------------------------------- who may open


ARMED = {"torchscript": armed_script, "pt2": armed_program}


@pytest.mark.parametrize("kind", ARMED)
def test_what_a_file_carries_runs_only_where_it_was_allowed(kind, tmp_path):
    canary = tmp_path / "canary"
    path = ARMED[kind](tmp_path / "model", canary)
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    for model in (path, path.parent):
        for attempt in (
            lambda model=model: LLM(str(model), runner="torch", tokenizer="simple"),
            lambda model=model: LLM(str(model), runner="numpy", tokenizer="simple"),
            lambda model=model: LLM(str(model), runner="torch"),
            lambda model=model: load_checkpoint(model),
            lambda model=model: open_archive(find_archive(model), [], CPU),
        ):
            with pytest.raises(NanoVLLMError):
                attempt()
    assert not inspect_model(path.parent).is_usable
    assert not canary.exists()
    with suppress(ModelError):  # the proof that it would have run
        open_archive(find_archive(path), [tmp_path], CPU)
    assert canary.exists()


@pytest.mark.parametrize("kind", ARMED)
def test_the_refusal_says_why_and_the_line_to_add(kind, files):
    path = files[kind]
    with pytest.raises(ConfigError) as caught:
        open_archive(find_archive(path), [], CPU)
    why = {"torchscript": "carries a program, which may run", "pt2": "falls back to unpickling, which can run anything"}
    assert why[kind] in caught.value.message
    assert "(now: none)" in caught.value.message
    line = re.search(r"`(allow_code_in: .*)` to `runner:`", caught.value.hint)[1]
    [allowed] = yaml.safe_load(line)["allow_code_in"]
    opened = open_archive(find_archive(path), [Path(allowed)], CPU)
    run = opened.module() if kind == "pt2" else opened
    assert run(torch.zeros((2, 3), dtype=torch.int64)).shape == (2, 3, 7)


def test_only_the_real_place_of_a_file_counts(files, tmp_path, monkeypatch):
    allowed, other = tmp_path / "allowed", tmp_path / "allowed-too"
    for place in (allowed, other):
        place.mkdir()
        (place / "model.pt").write_bytes(files["torchscript"].read_bytes())
    (allowed / "link.pt").symlink_to(other / "model.pt")
    (allowed / "up").symlink_to(other)
    (tmp_path / "way-in").symlink_to(allowed)
    monkeypatch.chdir(allowed)
    inside = [
        allowed / "model.pt", allowed, tmp_path / "way-in" / "model.pt", tmp_path / "way-in", Path("model.pt"),
        other / ".." / "allowed" / "model.pt",
    ]  # fmt: skip
    outside = [
        other / "model.pt", other, allowed / "link.pt", allowed / "up" / "model.pt", allowed / "up",
        allowed / ".." / "allowed-too" / "model.pt", Path("../allowed-too/model.pt"), Path("up/model.pt"),
    ]  # fmt: skip
    for place in (allowed, tmp_path / "way-in", other / ".." / "allowed", allowed / "model.pt"):
        for path in inside:
            assert isinstance(open_archive(find_archive(path), [place], CPU), torch.jit.ScriptModule)
        for path in outside:
            with pytest.raises(ConfigError, match=f"{other}/model.pt is a TorchScript archive"):
                open_archive(find_archive(path), [place], CPU)


def test_a_link_that_leads_out_of_the_model_directory_is_not_followed(files, tmp_path):
    (tmp_path / "model.pt").symlink_to(files["torchscript"])
    with pytest.raises(ModelError, match="leads outside"):
        find_archive(tmp_path)


def test_a_place_that_leads_nowhere_allows_nothing(files, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (tmp_path / "loop", Path("/no\0where"), Path("~nobody-of-that-name/models")):
        with pytest.raises(ConfigError, match=r"is no place that code can be allowed in|only files in places"):
            open_archive(find_archive(files["pt2"]), [place], CPU)
    with pytest.raises(ModelError, match=r"gone cannot be opened: .*No such file"):
        open_archive(Archive(tmp_path / "gone", "pt2", tmp_path), [tmp_path], CPU)


@pytest.mark.parametrize("place", ["models", "./models", "../models", "", "models/../.."])
def test_a_place_that_depends_on_the_current_directory_is_refused(place):
    with pytest.raises(ConfigError, match=r"runner.allow_code_in: .*full paths"):
        LLM("demo", runner={"type": "torch", "allow_code_in": [place]})


def test_the_word_of_the_founding_documents_is_refused_with_ours():
    with pytest.raises(ConfigError, match=r"unknown key 'runner.allow_torchscript' .*allow_code_in"):
        LLM("demo", runner={"type": "torch", "allow_torchscript": True})


@pytest.mark.parametrize("kind", ["torchscript", "pt2"])
def test_a_file_that_torch_cannot_open_is_one_sentence(kind, files, tmp_path):
    with zipfile.ZipFile(files[kind]) as source, zipfile.ZipFile(tmp_path / "model.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, b"\x00" if name.endswith((".py", "model.json")) else source.read(name))
    with pytest.raises(ModelError, match=r"cannot open .*/model.pt: .*; export it again"):
        open_archive(find_archive(tmp_path), [tmp_path], CPU)


@pytest.mark.parametrize("kind", ARMED)
def test_inspect_says_what_it_is_and_opens_nothing(kind, tmp_path):
    canary = tmp_path / "canary"
    model = ARMED[kind](tmp_path / "model", canary).parent
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = inspect_model(model)  # without config.json, which a program does not need
    assert (report.program, report.architecture, report.is_usable) == (KINDS[kind], None, True)
    [how] = [f.fix for f in report.findings if f.fix and "allow_code_in" in f.fix]
    assert yaml.safe_load(how.partition("allow_code_in: ")[2]) == [str(model)]
    for config, architecture in ((LLAMA, "llama"), ({"model_type": "unheard-of", "vocab_size": 2}, None)):
        (model / "config.json").write_text(json.dumps(config))
        report = inspect_model(model)
        assert (report.architecture and report.architecture.architecture, report.is_usable) == (architecture, True)
    (model / "config.json").write_text('{"vocab_size": 1}')
    assert [f.text for f in inspect_model(model).findings if f.level == "error"] == [
        "the tokenizer has 2 entries but the model only 1: they do not belong together"
    ]
    printed = CliRunner().invoke(cli, ["inspect", str(model)]).stdout
    assert f"  Program  {KINDS[kind]}\n" in printed
    assert not canary.exists()


def test_inspect_says_that_a_pickle_is_not_a_program(files, tmp_path):
    (tmp_path / "model.pt").write_bytes(files["pickle"].read_bytes())
    report = inspect_model(tmp_path)
    assert report.program is None
    assert any("is a pickle" in f.text and "export safetensors" in f.fix for f in report.findings if f.fix)
    assert not report.is_usable


def test_runners_without_torch_say_which_one_runs_it(files, tmp_path):
    (tmp_path / "model.pt2").write_bytes(files["pt2"].read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(UnsupportedModelError, match=r"only model.pt2, which torch wrote; use runner: torch"):
        load_checkpoint(tmp_path)


def test_weights_that_were_saved_for_torch_say_how_to_convert_them(tmp_path):
    write_checkpoint(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(array) for name, array in file_tensors(LLAMA).items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"only pickled weights .* nanovllm export safetensors --model"):
        load_checkpoint(tmp_path)


def test_telling_them_apart_needs_no_torch(files):
    program = (
        "import sys; from pathlib import Path; from nanovllm_runner_torch.archive import find_archive\n"
        f"print(find_archive(Path({str(files['pt2'])!r})).kind, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "pt2 False\n"
