"""Case: what a check is given, and how one is asked. Knows no check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import NanoVLLMError
from ..plugins import in_words
from .finding import Finding

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ..config import Loaded

    Options = TypeVar("Options", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Case:
    loaded: Loaded | None  # None: nothing was configured, so look at what is installed

    def is_chosen(self, section: str, name: str) -> bool:
        """Does the configuration name that plugin in its `runner`, `tokenizer` or `sampler` section?"""
        if self.loaded is None:
            return False
        kind: str = getattr(self.loaded.config, section).type
        return kind.partition("@")[0] == name

    def options(self, section: str, name: str, model: type[Options]) -> Options | None:
        """The plugin's own options, if it is chosen and they are valid (where not, the check `engine` says so)."""
        from pydantic import ValidationError

        if self.loaded is None or not self.is_chosen(section, name):
            return None
        try:
            return model.model_validate(getattr(self.loaded.config, section).options)
        except ValidationError:
            return None


def ask(examine: Callable[[Case], Iterator[Finding]], case: Case, distribution: str) -> Iterator[Finding]:
    """The findings of a check of that distribution; whatever it raises is one, too."""
    try:
        for finding in examine(case):
            if not isinstance(finding, Finding):
                raise TypeError(f"it gave {finding!r:.60}, which is no Finding")
            yield finding
    except NanoVLLMError as e:
        yield Finding("error", e.message, e.hint)
    except Exception as e:
        yield Finding("error", f"this check failed: {in_words(e)}", f"report it to the authors of {distribution}")
