"""Check what `make build` made: `python scripts/check_dist.py dist`, or `... dist 0.2.0` if it must be that version.

Each distribution has one wheel, for any Python 3 on any system, and one sdist, all of one version. Every file in them
belongs to its own package and all of its files are in the wheel; the licence is in each.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SDIST_EXTRAS = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"}


def packages() -> dict[str, Path]:
    """The import packages of this repository, each with its directory: a distribution has the name of its package."""
    found = sorted(path.parent for path in REPO.glob("plugins/*/nanovllm_*/__init__.py"))
    return {"nanovllm": REPO / "core" / "nanovllm"} | {path.name: path for path in found}


def problems(dist: Path, version: str | None = None) -> list[str]:
    found = []
    versions = sorted({path.name.split("-")[1] for path in dist.glob("*.whl")})
    if len(versions) > 1:
        found.append(f"the wheels are of several versions: {', '.join(versions)}")
    elif version is not None and versions != [version]:
        found.append(f"the wheels are of version {', '.join(versions)}, not {version}")
    for package, home in packages().items():
        wheels = sorted(dist.glob(f"{package}-*.whl"))
        sdists = sorted(dist.glob(f"{package}-*.tar.gz"))
        if (len(wheels), len(sdists)) != (1, 1):
            found.append(f"{package}: {len(wheels)} wheels and {len(sdists)} sdists, not one of each")
            continue
        if not wheels[0].name.endswith("-py3-none-any.whl"):
            found.append(f"{wheels[0].name} is not for any Python 3 on any system")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = wheel.namelist()
        sources = [p.relative_to(home.parent).as_posix() for p in home.rglob("*") if p.is_file()]
        found += [f"{wheels[0].name} lacks {n}" for n in sources if "__pycache__" not in n and n not in names]
        strays = [n for n in names if n.split("/")[0] != package and not n.split("/")[0].endswith(".dist-info")]
        found += [f"{wheels[0].name} carries {name}" for name in strays]
        if not any(name.endswith("/LICENSE") for name in names):
            found.append(f"{wheels[0].name} has no LICENSE")
        with tarfile.open(sdists[0]) as sdist:
            inside = [name.partition("/")[2] for name in sdist.getnames()]
        place = f"core/{package}/" if package == "nanovllm" else f"{package}/"
        found += [
            f"{sdists[0].name} carries {name}"
            for name in inside
            if name and not name.startswith(place) and name not in SDIST_EXTRAS
        ]
    return found


if __name__ == "__main__":
    dist = Path(sys.argv[1])
    if wrong := problems(dist, *sys.argv[2:]):
        sys.exit("\n".join(wrong))
    for path in sorted(dist.iterdir()):
        print(f"{path.stat().st_size:>10,} bytes  {path.name}")
