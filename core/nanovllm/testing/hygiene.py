"""What every plugin must keep, whatever it does: cheap to import, made in time, silent, and nothing else is changed.

The base of the suites for plugins that a configuration names. This file knows no kind of plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from .fresh import Fresh, fresh, make
from .suite import Conformance, level


class Hygiene(Conformance):
    group: ClassVar[str]  # of entry points: "runners", "tokenizers", "samplers" or "models"
    startup_seconds: ClassVar[float] = 60  # for importing and making it; a large model may need more

    @classmethod
    def make(cls, config: Mapping[str, Any]) -> Any:
        """What is tested, in this process."""
        return make(cls.group, config)

    @pytest.fixture(scope="class")
    @classmethod
    def fresh(cls, config: Mapping[str, Any]) -> Fresh:
        """What importing and making it did in a process of its own."""
        return fresh(cls.group, config, cls.startup_seconds)

    @pytest.fixture(scope="class")
    @classmethod
    def makeable(cls, fresh: Fresh) -> None:
        """What makes it in this process asks for this first: a plugin that hangs must hang only the child."""
        if fresh.problem is not None:
            pytest.skip("it could not be made")

    @level("basic")
    def test_it_is_made(self, fresh: Fresh) -> None:
        assert fresh.problem is None, fresh.problem

    @level("robust")
    def test_importing_it_loads_no_runtime(self, fresh: Fresh) -> None:
        """Everyone who lists, shows or chooses plugins imports it; compiled libraries belong in `create_*`."""
        if fresh.extensions is None:
            pytest.skip("it could not be imported")
        loaded = ", ".join(fresh.extensions)
        assert not loaded, f"importing it loads compiled libraries ({loaded}): import them where they are used"

    @level("robust")
    def test_it_leaves_stdout_alone(self, fresh: Fresh) -> None:
        first = fresh.printed.strip().partition("\n")[0]
        assert not fresh.printed, f"it wrote to stdout, which belongs to the answers: {first!r:.80}"

    @level("robust")
    def test_it_leaves_the_process_as_it_was(self, fresh: Fresh) -> None:
        """Other engines, servers and notebooks live in it too."""
        if fresh.problem is not None:
            pytest.skip("it could not be made")
        changed = " and ".join(fresh.changed)
        assert not changed, f"making it changes {changed}, which the whole process shares: leave that to who starts it"
