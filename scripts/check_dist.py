"""Check what `make build` made: `python scripts/check_dist.py dist`.

Each distribution has one wheel and one sdist, every file in them belongs to its own package and all of its files are
in the wheel, the licence is in each, and the root's carry nothing of plugins/.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGES = (
    "nanovllm",
    "nanovllm_models",
    "nanovllm_runner_http",
    "nanovllm_runner_numpy",
    "nanovllm_runner_onnx",
    "nanovllm_runner_torch",
    "nanovllm_server",
    "nanovllm_tokenizers",
)
SDIST_EXTRAS = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"}


def problems(dist: Path) -> list[str]:
    found = []
    for package in PACKAGES:
        wheels = sorted(dist.glob(f"{package}-*.whl"))
        sdists = sorted(dist.glob(f"{package}-*.tar.gz"))
        if (len(wheels), len(sdists)) != (1, 1):
            found.append(f"{package}: {len(wheels)} wheels and {len(sdists)} sdists, not one of each")
            continue
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = wheel.namelist()
        project = REPO / "core" if package == "nanovllm" else next(REPO.glob(f"plugins/*/{package}")).parent
        sources = [p.relative_to(project).as_posix() for p in (project / package).rglob("*") if p.is_file()]
        found += [f"{wheels[0].name} lacks {n}" for n in sources if "__pycache__" not in n and n not in names]
        strays = [n for n in names if n.split("/")[0] != package and not n.split("/")[0].endswith(".dist-info")]
        found += [f"{wheels[0].name} carries {name}" for name in strays]
        if not any(name.endswith("/LICENSE") for name in names):
            found.append(f"{wheels[0].name} has no LICENSE")
        with tarfile.open(sdists[0]) as sdist:
            inside = [name.partition("/")[2] for name in sdist.getnames()]
        home = f"core/{package}/" if package == "nanovllm" else f"{package}/"
        found += [
            f"{sdists[0].name} carries {name}"
            for name in inside
            if name and not name.startswith(home) and name not in SDIST_EXTRAS
        ]
    return found


if __name__ == "__main__":
    dist = Path(sys.argv[1])
    if wrong := problems(dist):
        sys.exit("\n".join(wrong))
    for path in sorted(dist.iterdir()):
        print(f"{path.stat().st_size:>10,} bytes  {path.name}")
