"""The bar: the seed's line, on a terminal only."""

from __future__ import annotations

import io
import math
import re

import pytest

from nanovllm.progress import Progress, bar_line

LINE = re.compile(
    r"Generating \[Prefill: \d+tok/s, Decode: \d+tok/s\] (\d+)% \[(=* *)\] \((\d+)/(\d+), \d+\.\d it/s\)"
)  # S0-16


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_seeds_line() -> None:
    line = bar_line(1, 1, 1 / 1.2, (89.0, 23.0), 40)
    assert line == "Generating [Prefill: 89tok/s, Decode: 23tok/s] 100% [====] (1/1, 1.2 it/s)"


@pytest.mark.parametrize("rates", [(0.0, math.inf), (math.nan, -math.inf), (1e9, 1e-9)])
@pytest.mark.parametrize("finished", [0, 1, 2, 3])
@pytest.mark.parametrize("seconds", [0.0, 1e-9, 5.0])
@pytest.mark.parametrize("columns", [1, 79, 200])
def test_every_line_is_well_formed(rates: tuple[float, float], finished: int, seconds: float, columns: int) -> None:
    match = LINE.fullmatch(bar_line(finished, 3, seconds, rates, columns))
    assert match
    percent, bar, done, total = match.groups()
    assert (int(percent), int(done), int(total)) == (100 * finished // 3, finished, 3)
    assert bar.count("=") == len(bar) * finished // 3


def test_a_terminal_gets_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    with Progress(2, stream) as progress:
        progress.update(1, None, None)
        progress.update(2, 89.4, 23.2)
    last = LINE.findall(stream.getvalue())[-1]
    assert (last[0], last[2], last[3]) == ("100", "2", "2")
    assert "Prefill: 89tok/s, Decode: 23tok/s" in stream.getvalue()
    assert capsys.readouterr() == ("", "")


def test_no_terminal_no_bar() -> None:
    for stream, enabled in ((io.StringIO(), None), (Terminal(), False)):
        with Progress(1, stream, enabled) as progress:
            progress.update(1, 1.0, 1.0)
        assert stream.getvalue() == ""


def test_the_bar_ends_when_the_work_fails() -> None:
    stream = Terminal()
    progress = Progress(2, stream)
    with pytest.raises(KeyError), progress:
        raise KeyError
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is back
