"""`nanovllm plugins new`: an installable package for a runner, a tokenizer, a sampler or a model family.

Every file of such a package is a file in `templates/`: `common/`, then the directory of its kind. This file knows
names, versions and places, and nothing of what a plugin does.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..errors import ConfigError
from ..hookspecs import API_VERSION
from ..plugins import KINDS, discover, normal_name

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between the packages; `$name` and the like stand for the values of `_values`."""

    group: str  # of entry points
    requires: tuple[str, ...]  # besides nanovllm
    file: str  # of the module, where its author writes
    method: str  # what is left to write there
    entry: str = "$name"  # the entry point's name
    value: str = "$module:plugin"  # what the entry point names
    tested: str = "$name"  # what `nanovllm plugins test` is told; but for a family also what a configuration writes


_MODELS, _NUMPY, _PYDANTIC = "nanovllm-models$range", "numpy>=1.24", "pydantic>=2.6"
PACKAGES = {
    "runner": Kind("runners", (_MODELS, _NUMPY, _PYDANTIC), "runner.py", "${title}Runner.forward"),
    "tokenizer": Kind("tokenizers", (_PYDANTIC,), "tokenizer.py", "${title}Tokenizer.split"),
    # A sampler's name is the kind of logits that it takes; of several for one kind the distribution chooses.
    "sampler": Kind(
        "samplers",
        (_NUMPY, _PYDANTIC),
        "sampler.py",
        "${title}Sampler.draw",
        entry="numpy",
        tested="numpy@$distribution",
    ),
    "family": Kind(
        "models", (_MODELS,), "__init__.py", "spec", value="$module", tested="$name --model tests/config.json"
    ),
}


@dataclass(frozen=True, slots=True)
class Written:
    directory: Path
    file: Path  # where its author writes
    method: str  # what is left to write there: "AcmeRunner.forward"
    tested: str  # what `nanovllm plugins test` is told, in that directory


def write_package(kind: str, name: str, directory: Path | None = None, is_example: bool = False) -> Written:
    """Write the package of a new plugin into `directory`, or else ./nanovllm-NAME: all of it or nothing.

    `kind`: a key of PACKAGES. `is_example`: with a small working body for the method. Raises ConfigError for a name
    that cannot be used or is taken, and for a directory that exists or cannot be written.
    """
    values = _values(PACKAGES[kind], name)
    target = Path(values["distribution"]) if directory is None else directory.expanduser()
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists already", hint="choose another --directory")
    try:
        # Beside the place, and then moved there whole.
        half = Path(tempfile.mkdtemp(prefix=".nanovllm-new-", dir=target.absolute().parent))
        try:
            _write_files(kind, values, is_example, half)
            half.chmod(0o755)  # mkdtemp's is for one user alone
            half.rename(target)
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)
            raise
    except OSError as e:
        raise ConfigError(f"{target} cannot be written: {e.strerror or e}", hint="choose another --directory") from e
    return Written(target, target / values["module"] / PACKAGES[kind].file, values["method"], values["tested"])


def _values(package: Kind, name: str) -> dict[str, str]:
    """What the templates are filled in with. Raises ConfigError for a name that cannot be used."""
    import yaml

    name, kind = name.removeprefix("nanovllm-"), KINDS[package.group]
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or len(name) > 40:
        raise ConfigError(
            f"{name!r:.60} cannot be the name of a {kind}",
            hint="use at most 40 lower-case letters, digits and single hyphens, a letter first, such as acme-gpu",
        )
    if yaml.safe_load(name) != name:
        raise ConfigError(f"{name!r} is no text in YAML, where a configuration names it", hint="choose another name")
    distribution = normal_name(f"nanovllm-{name}")
    for found in discover(package.group):
        if found.name == name:
            raise ConfigError(
                f"a {kind} named {name!r} is installed already, by {found.distribution} {found.version}",
                hint="choose another name",
            )
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(distribution)
        raise ConfigError(f"a distribution {distribution} {version} is installed already", hint="choose another name")
    major, minor = map(int, __version__.split(".")[:2])
    values = {
        "kind": kind,
        "name": name,
        "distribution": distribution,
        "module": f"nanovllm_{name.replace('-', '_')}",
        "title": "".join(part.capitalize() for part in re.split("[-_]", name)),
        "group": package.group,
        "range": f">={major}.{minor},<{major}.{minor + 2}",  # a plugin for core N also runs on core N + 1
        "api_version": str(API_VERSION),
    }
    for key in ("entry", "value", "method", "tested"):
        values[key] = string.Template(getattr(package, key)).substitute(values)
    lines = ("nanovllm$range", *package.requires)
    values["requires"] = "\n".join(f'  "{string.Template(line).substitute(values)}",' for line in lines)
    return values


def _write_files(kind: str, values: dict[str, str], is_example: bool, target: Path) -> None:
    for directory in (_TEMPLATES / "common", _TEMPLATES / kind):
        for template in sorted(directory.rglob("*.template")):  # so named, it is no file of ours to any tool
            relative = template.relative_to(directory).as_posix().removesuffix(".template")
            path = target / relative.replace("MODULE", values["module"])
            path.parent.mkdir(parents=True, exist_ok=True)
            text = _chosen_lines(template.read_text(encoding="utf-8"), is_example)
            path.write_text(string.Template(text).substitute(values), encoding="utf-8", newline="\n")


def _chosen_lines(text: str, is_example: bool) -> str:
    """A line `#: example`, `#: blank` or `#: both` says for which packages the lines after it are."""
    lines, is_kept = [], True
    for line in text.splitlines(keepends=True):
        if (mark := line.strip()) in ("#: example", "#: blank", "#: both"):
            is_kept = mark == "#: both" or (mark == "#: example") == is_example
        elif is_kept:
            lines.append(line)
    return "".join(lines)
