"""Finding: one thing that was found out. Knows no check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

# ok: proven to work. note: good to know. warning: it works, and not as well as it could. error: it does not work.
Level: TypeAlias = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    text: str  # one sentence, without a full stop
    fix: str | None = None  # the command or edit that helps

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"the level of a finding is {self.level!r:.60}, not one of {', '.join(get_args(Level))}")
        if not isinstance(self.text, str) or not isinstance(self.fix, (str, type(None))):
            raise TypeError(f"a finding has strings, not {self.text!r:.60} and {self.fix!r:.60}")
