"""`nanovllm doctor`: what really runs here, what is wrong with it, and the command that helps."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .options import EngineCommand, engine_options
from .terminal import echo, printable

if TYPE_CHECKING:
    from ..config import Loaded
    from ..doctor.examination import Remark


@click.command(cls=EngineCommand)
@engine_options
@click.option("--timeout", type=click.IntRange(1, 86400), default=120, show_default=True,
              help="Seconds that one check may take.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def doctor(ctx: click.Context, loaded: Loaded, timeout: int, as_json: bool) -> None:
    """Find out what really runs here, and what is wrong.

    One line per finding: ok, note, warning or error, and the command that helps. With any configuration (--config,
    --model, --runner, ...) its engine is loaded, asked and measured. The exit status is 1 if there is an error.
    """
    from ..doctor import Case
    from ..doctor.examination import examine_all
    from ..progress import Waiting

    case = Case(loaded if loaded.origins else None)
    remarks = []
    for remark in examine_all(
        case, timeout, lambda subject: nullcontext() if as_json else Waiting(f"examining {subject} ...")
    ):
        remarks.append(remark)
        if not as_json:
            _print(remark)
    counts = Counter(finding.level for _, finding in remarks)
    if as_json:
        rows = [{"subject": subject, **asdict(finding)} for subject, finding in remarks]
        echo(json.dumps({"is_healthy": not counts["error"], "findings": rows}, indent=2))
    else:
        echo(f"{_counted(counts['error'], 'error')}, {_counted(counts['warning'], 'warning')}")
    if counts["error"]:
        ctx.exit(1)


def _print(remark: Remark) -> None:
    level, text, fix = remark.finding.level, remark.finding.text, remark.finding.fix
    line = f"{level:<7}  {remark.subject}: {text}"
    echo(printable(f"{line}; {fix}" if fix else line))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
