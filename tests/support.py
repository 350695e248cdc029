"""What the tests share: where the optional test data is, and the mark that skips without it."""

from __future__ import annotations

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
DATA = REPO.parent / "shared" / "data"
SPEC = REPO.parent / "shared" / "spec"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the repository")
needs_spec = pytest.mark.skipif(not SPEC.is_dir(), reason="needs ../shared/spec beside the repository")
