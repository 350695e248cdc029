"""docs/models.md: its tables are made from the registry and the tests' lists, and committed as made."""

from __future__ import annotations

import runpy

import model_cases
import published_configs
from nanovllm_models import known_architectures, refused_architectures
from support import REPO

matrix = runpy.run_path(str(REPO / "scripts" / "model_matrix.py"))


def test_the_committed_page_is_current():
    assert (REPO / "docs" / "models.md").read_text(encoding="utf-8") == matrix["page"](), (
        "run python scripts/model_matrix.py"
    )


def test_every_family_has_a_row_and_is_tested():
    rows = [line.split("|") for line in matrix["tables"]().splitlines() if line.startswith("| `")]
    status = {row[1].strip(" `"): row[2].strip() for row in rows if "model_type" not in row[1]}
    assert set(status) == set(known_architectures()) | set(refused_architectures())
    for name in known_architectures():
        assert status[name] == "tested against transformers", f"{name} has no model in model_cases.py"
    assert {t for t, *_ in model_cases.MODELS.values()} == set(known_architectures())
    assert {c["model_type"] for c, _ in published_configs.MODELS.values()} <= set(known_architectures())
