"""The conformance suite of nanovllm on this runner.

`nanovllm plugins test example-jax` prints it as a table.
"""

from __future__ import annotations

import pytest
from nanovllm.testing import RunnerConformance


class TestExampleJax(RunnerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> dict[str, object]:
        return {"model": "demo", "runner": "example-jax"}
