"""`PartsTokenizer`: for libraries that encode plain text only, so control tokens are put in between here.

    "<s>[INST] hi [/INST]"  ->  [1, 3, *plain(" hi "), 4]

This file knows no library: the subclass encodes the plain parts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from .base import BaseTokenizer


class PartsTokenizer(BaseTokenizer):
    def __init__(self, *, before: Sequence[int], after: Sequence[int], **common: Any) -> None:
        """`before` and `after`: the ids that a plain prompt gets at its ends, such as BOS."""
        super().__init__(**common)
        self._before = before
        self._after = after

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        parts = self._controls.split(text)
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._plain(part, is_first=i == 0)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    @abstractmethod
    def _plain(self, text: str, is_first: bool) -> list[int]:
        """The ids of a stretch of text that holds no control token; `is_first`: none comes before it."""
