"""A model's files from a Hugging Face hub into a directory: only the kinds that are read, every byte checked.

The hub says what there is (`HfApi.model_info`) and `http_get` moves bytes. The rest is here, because
`hf_hub_download` neither goes on with what an earlier run began (huggingface_hub issue 4196) nor looks at
checksums: a file is written beside its place as `NAME.HASH.part`, grows over as many runs as it takes, and gets its
name once its hash is the hub's. No file that could carry code is ever asked for. Knows no model family.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigError, ModelError, PluginError

from . import model_info
from .files import COMPANIONS
from .model_info import ModelInfo
from .torch_files import PICKLED

WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors"
TEXTS = (*COMPANIONS, "model.safetensors.index.json")
ONNX = ("*.onnx", "*.onnx_data", "*.onnx_data_*", "*.onnx.data")  # in any folder


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of one commit of a repository."""

    name: str  # with forward slashes
    size: int  # bytes
    algorithm: str  # of `digest`: sha256 of the content (large files), or git-sha1 of git's blob
    digest: str  # lower-case hex

    def matches(self, path: Path) -> bool:
        """Has the file there this size and this hash?"""
        if path.stat().st_size != self.size:
            return False
        hash = hashlib.sha256() if self.algorithm == "sha256" else hashlib.sha1(usedforsecurity=False)
        if self.algorithm == "git-sha1":
            hash.update(b"blob %d\0" % self.size)
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                hash.update(chunk)
        return hash.hexdigest() == self.digest


def pull(
    repo: str,
    directory: Path,
    *,
    revision: str = "main",
    onnx: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[HubFile]:
    """Bring `directory` up to date with the repository; returns the files. `tell` gets a line for each.

    Raises ConfigError for an impossible id or directory, PluginError without huggingface_hub, and ModelError for what
    the hub does not have, does not give or gives damaged. An interrupted pull goes on where it was when called again.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, validate_repo_id
    except ImportError as e:
        raise PluginError(
            f"pull needs huggingface_hub, which cannot be imported: {e}",
            hint="try: pip install 'nanovllm-models[pull]'",
        ) from e

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise ConfigError(
            f"{repo!r} is no model id: {str(e).splitlines()[0]}", hint="it looks like 'org/name'"
        ) from None
    # Read here and not by the library, which does it once, when it is first imported.
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    headers = build_hf_headers(library_name="nanovllm") | {"Accept-Encoding": "identity"}
    with _one_sentence(repo, revision, endpoint):
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True, timeout=10)
        files = choose([_hub_file(repo, s) for s in info.siblings or ()], repo, onnx)
        _check_directory(directory, files, repo)
        for file in files:
            path = _place(directory, file.name, repo)
            if path.exists() and file.matches(path):
                tell(f"{file.name}: already there")
                continue
            part = path.with_name(f"{path.name}.{file.digest[:12]}.part")
            with part.open("ab") as out:
                if (begun := out.tell()) > file.size:
                    out.truncate(begun := 0)
                http_get(
                    hf_hub_url(repo, file.name, revision=info.sha, endpoint=endpoint),
                    out,
                    resume_size=begun,
                    headers=headers,
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
            if not file.matches(part):
                part.unlink()
                raise ModelError(
                    f"{file.name} of {repo} arrived damaged: its {file.algorithm} is not {file.digest[:12]}...",
                    hint="run the command again to download it anew",
                )
            os.replace(part, path)
            tell(f"{file.name}: {file.size:,} bytes" + (f", of which {begun:,} were there" if begun else ""))
    if not (directory / model_info.FILE_NAME).exists() and (directory / "config.json").exists():
        try:
            replace(ModelInfo.read(directory), model_name=repo).write(directory)
            tell(f"{model_info.FILE_NAME}: written from config.json")
        except ModelError as e:  # a config of another shape: the runner that knows it needs no model_info.json
            tell(f"no {model_info.FILE_NAME}: {e.message}")
    return files


def choose(files: list[HubFile], repo: str, onnx: bool = False) -> list[HubFile]:
    """Those that are read, small ones first. Raises ModelError if no weights are among them."""
    weights = [f for f in files if re.fullmatch(WEIGHTS, f.name)]
    graphs = [f for f in files if any(fnmatchcase(f.name, pattern) for pattern in ONNX)]
    texts = [f for f in files if "/" not in f.name and any(fnmatchcase(f.name, pattern) for pattern in TEXTS)]
    if not weights and not (onnx and graphs):
        pickled = [f.name for f in files if f.name.endswith(PICKLED)]
        if graphs and not onnx:
            raise ModelError(f"{repo} has no safetensors weights, but ONNX graphs", hint="add --onnx to pull those")
        raise ModelError(
            f"{repo} has no safetensors weights"
            + (f", only pickled ones ({', '.join(pickled[:3])}), and nothing is ever unpickled" if pickled else ""),
            hint="look for a repository or a --revision that has model.safetensors",
        )
    return sorted([*texts, *weights, *(graphs if onnx else ())], key=lambda f: (f.size, f.name))


def _hub_file(repo: str, sibling: Any) -> HubFile:
    name, size, lfs = sibling.rfilename, sibling.size, sibling.lfs
    algorithm, digest = ("git-sha1", sibling.blob_id) if lfs is None else ("sha256", lfs.sha256)
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(digest)) or type(size) is not int or size < 0:
        raise ModelError(
            f"the hub gives no checksum or size for {name!r:.100} of {repo}", hint="use another HF_ENDPOINT"
        )
    return HubFile(str(name), size, algorithm, str(digest))


def _place(directory: Path, name: str, repo: str) -> Path:
    """Where the file goes: inside the directory, whatever its name and the links that lie there say."""
    path = directory / name
    is_plain = all(re.fullmatch(r"[^\\:\0-\x1f]+", part) and part.strip(". ") for part in name.split("/"))
    if is_plain and path.parent.resolve().is_relative_to(directory.resolve()) and not path.is_symlink():
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
    raise ModelError(
        f"{repo} has a file {name!r:.100}, which does not stay inside {directory}",
        hint="if a link lies there, remove it; else do not trust the repository",
    )


def _check_directory(directory: Path, files: list[HubFile], repo: str) -> None:
    """Weights of another model beside these would be loaded instead of them."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory", hint="choose another --output")
    directory.mkdir(parents=True, exist_ok=True)
    names = {f.name for f in files}
    other = sorted(p.name for p in directory.iterdir() if re.fullmatch(WEIGHTS, p.name) and p.name not in names)
    if other:
        raise ConfigError(f"{directory} holds {other[0]}, which {repo} does not have", hint="choose an empty --output")


@contextmanager
def _one_sentence(repo: str, revision: str, endpoint: str) -> Iterator[None]:
    """What the hub's library raises, as errors of ours."""
    from huggingface_hub import errors

    again = "run the command again: it goes on where it was"
    try:
        yield
    except errors.OfflineModeIsEnabled as e:
        raise ModelError(f"{repo} cannot be pulled in offline mode", hint="unset HF_HUB_OFFLINE") from e
    except errors.GatedRepoError as e:
        raise ModelError(
            f"{repo} is gated", hint=f"accept its terms at {endpoint}/{repo}, then set HF_TOKEN or run: hf auth login"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise ModelError(f"{repo} has no revision {revision!r}", hint="leave --revision away for main") from e
    except errors.RepositoryNotFoundError as e:
        raise ModelError(
            f"{endpoint} has no model {repo}, or it is private", hint="check the name, or set HF_TOKEN to see it"
        ) from e
    except errors.HfHubHTTPError as e:
        raise ModelError(f"{endpoint} answered {e.response.status_code} for {repo}", hint=again) from e
    except errors.HTTPError as e:  # of the HTTP client: nobody there, or not for long enough
        cause = type(e).__name__ + (f": {e}" if str(e) else "")
        raise ModelError(
            f"no answer from the hub at {endpoint} ({cause})",
            hint="check the network or HF_ENDPOINT, then run the command again",
        ) from e
    except OSError as e:  # the disk, or fewer bytes than announced
        raise ModelError(f"pulling {repo} failed: {str(e).splitlines()[0]}", hint=again) from e
