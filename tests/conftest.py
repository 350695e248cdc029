"""Hypothesis profiles: short by default, `--hypothesis-profile=long` for `make test-slow`. And shared fixtures."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from wheels_support import PROJECTS, Environment, build

settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=100
)
settings.register_profile("long", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=2000)
settings.load_profile("default")

# A shell starts what runs in the background with Ctrl-C ignored, and so would be all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the sdist of every distribution, as `make build` makes them."""
    out = tmp_path_factory.mktemp("dist")
    for project in PROJECTS:
        build(project, out)
    return out


@pytest.fixture(scope="session")
def environment(wheels: Path) -> Callable[[Path], Environment]:
    """environment(tmp_path): an empty virtual environment there, for our wheels and whatever they need."""
    return lambda home: Environment(home, wheels)
