"""What is installed of this project and for it, from metadata and files alone. Imports nothing of it."""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from ..plugins import KINDS, absent, discover, normal_name, requirements
from .case import Case
from .finding import Finding

CORE = "nanovllm"
NEVER_NAMED = ("doctors", "conformance")  # groups whose names no configuration and no command uses
FOREIGN = "nano-vllm"  # GeeeekExplorer's: another project, whose import name is ours


def examine(case: Case) -> Iterator[Finding]:
    installed = [d for d in metadata.distributions() if d.metadata["Name"]]  # without: what pip left of one
    ours = [d for d in installed if any(entry.group.startswith(f"{CORE}.") for entry in d.entry_points)]
    yield Finding("ok", ", ".join(sorted({f"{d.name} {d.version}" for d in ours})))
    yield from _foreign(installed)
    for distribution in ours:
        yield from _changed(distribution)
        yield from _unmet(distribution)
    yield from _twice(ours)
    yield from _clashes()
    for group in ("runners", "commands"):
        for line, names in absent(group).items():
            yield Finding("note", f"not installed: {KINDS[group]} {', '.join(names)}", line)


def _foreign(installed: Iterable[metadata.Distribution]) -> Iterator[Finding]:
    """Whoever else brings files for `import nanovllm`: the last one installed has overwritten the other's."""
    for distribution in installed:
        name = normal_name(distribution.name)
        files = f"\n{distribution.read_text('RECORD')}\n{distribution.read_text('top_level.txt')}\n"
        if name != CORE and (name == FOREIGN or f"\n{CORE}/" in files or f"\n{CORE}\n" in files):
            yield Finding(
                "error",
                f"{distribution.name} {distribution.version} is another project with the same import name: "
                "each overwrites the other's files",
                f"pip uninstall -y {distribution.name} && pip install --force-reinstall --no-deps {CORE}",
            )


def _changed(distribution: metadata.Distribution) -> Iterator[Finding]:
    """Files that are not the ones that pip installed, by their hashes. An editable installation has none."""
    changed = []
    for file in distribution.files or ():
        if file.hash is None or file.suffix != ".py":
            continue
        try:
            digest = hashlib.new(file.hash.mode, Path(str(file.locate())).read_bytes()).digest()
        except OSError:
            changed.append(f"{file} (missing)")
            continue
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            changed.append(str(file))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        yield Finding(
            "warning",
            f"{distribution.name}: {', '.join(changed[:3])}{more} is not what was installed",
            f"pip install --force-reinstall --no-deps {distribution.name}=={distribution.version}",
        )


def _unmet(distribution: metadata.Distribution) -> Iterator[Finding]:
    """pip only warns about these when it installs something else."""
    for requirement in requirements(distribution.name):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            have = "it is not installed" if version is None else f"{version} is installed"
            needed = f"{requirement.name}{requirement.specifier}"
            yield Finding("error", f"{distribution.name} {distribution.version} needs {needed}, and {have}",
                          f"pip install '{needed}'")  # fmt: skip


def _twice(ours: Iterable[metadata.Distribution]) -> Iterator[Finding]:
    """The first on sys.path is the one that counts."""
    places: dict[str, dict[Path, str]] = defaultdict(dict)  # name -> place -> version
    for distribution in ours:
        place = Path(str(distribution.locate_file(""))).resolve()
        places[normal_name(distribution.name)].setdefault(place, distribution.version)
    for name, versions in places.items():
        if len(versions) > 1:
            listed = " and ".join(f"{version} in {place}" for place, version in versions.items())
            yield Finding("warning", f"{name} is installed {len(versions)} times: {listed}", f"pip uninstall {name}")


def _clashes() -> Iterator[Finding]:
    offers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for found in discover():
        offers[found.group, found.name].append(found.distribution)
    for (group, name), distributions in offers.items():
        if len(distributions) > 1 and group not in NEVER_NAMED:
            yield Finding(
                "note" if group == "samplers" else "warning",  # `sampler: auto` chooses among several
                f"{KINDS[group]} '{name}' is offered by {' and '.join(distributions)}, so the name alone is refused",
                f"write {name}@{distributions[0]} to choose, or uninstall one",
            )
