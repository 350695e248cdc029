"""Writes the tables of docs/models.md from the registry and the tests' lists of models.

    python scripts/model_matrix.py          write docs/models.md
    python scripts/model_matrix.py --check  exit 1 if the committed page is not current

A family is "tested against transformers" because tests/test_numpy_parity.py builds the models that are listed here, and
"configuration only" where it has none. Nothing in the tables is written by hand.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from nanovllm_models.registry import find_family, known_architectures, refused_architectures

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "models.md"
BEGIN, END = "<!-- made by scripts/model_matrix.py: begin -->", "<!-- made by scripts/model_matrix.py: end -->"


def tables() -> str:
    tested = runpy.run_path(str(REPO / "tests" / "model_cases.py"))["MODELS"]
    published = runpy.run_path(str(REPO / "tests" / "published_configs.py"))["MODELS"]
    lines = ["| `model_type` | status | variants compared | published configurations read |", "|---|---|---|---|"]
    for name in known_architectures():
        if not find_family(name).__name__.startswith("nanovllm_models."):
            continue  # somebody else's
        variants = [case.removeprefix(name).lstrip("-") or "plain" for case, (t, *_) in tested.items() if t == name]
        configs = [f"{model} ({size / 1e9:.2f} B)" for model, (c, size) in published.items() if c["model_type"] == name]
        status = "tested against transformers" if variants else "configuration only"
        lines.append(f"| `{name}` | {status} | {', '.join(variants)} | {', '.join(configs)} |")
    lines += ["", "Refused by name:", "", "| `model_type` | because |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(refused_architectures().items())]
    return "\n".join(lines)


def page() -> str:
    """The page with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.name} is not current: run python scripts/model_matrix.py")


if __name__ == "__main__":
    main()
