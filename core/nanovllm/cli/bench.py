"""`nanovllm bench`: how fast is a configuration, and `--compare A.yaml B.yaml`: which of them is faster."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import EngineCommand, distinct, engine_options
from .terminal import echo

if TYPE_CHECKING:
    from ..bench.compare import Comparison
    from ..bench.report import Report
    from ..bench.trace import Tracer
    from ..bench.workload import Workload
    from ..config import Loaded
    from ..engine import Engine

MOST_TOKENS = 2**20  # of one drawn prompt or answer


def _lengths(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`100` or `100-1024`: a number of tokens, or a range with both ends included."""
    if value is None:
        return None
    low, _, high = value.partition("-")
    ends = (low, high or low)
    if not all(e.isascii() and e.isdigit() and len(e) < 10 for e in ends):
        raise click.BadParameter(f"{value!r} is neither a number nor a range such as 100-1024")
    if not 1 <= int(ends[0]) <= int(ends[1]) <= MOST_TOKENS:
        raise click.BadParameter(f"{value!r} must go upwards, from 1 to {MOST_TOKENS}")
    return int(ends[0]), int(ends[1])


@click.command(cls=EngineCommand)
@click.argument("configs", nargs=-1, type=click.Path(path_type=Path), metavar="[CONFIG.yaml]...")
@engine_options
@click.option("--compare", "is_comparison", is_flag=True, help="Compare the CONFIGs, in turns.")
@click.option("--workload", "workload_file", type=click.Path(path_type=Path), help="JSON file of requests.")
@click.option("--preset", type=click.Choice(["nano-vllm"]), help="256 sequences, 100 to 1024 tokens in and out.")
@click.option("--num-requests", type=click.IntRange(1, 2**20), help="Requests to draw.  [default: 32]")
@click.option("--input-len", metavar="N|LOW-HIGH", callback=_lengths, help="Tokens per prompt.  [default: 20-215]")
@click.option("--output-len", metavar="N|LOW-HIGH", callback=_lengths, help="Tokens per answer.  [default: 24-107]")
@click.option("--seed", type=click.IntRange(0), help="Of the drawn requests.  [default: 0]")
@click.option("--runs", type=click.IntRange(1, 1000), help="How often to measure.  [default: 3; 5 with --compare]")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=1800, show_default=True,
              help="With --compare: seconds that one answer may take.")  # fmt: skip
@click.option("--format", "style", type=click.Choice(["text", "markdown", "comparison-md"]), default="text",
              show_default=True, help="What is printed.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write a JSON document.")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path), help="Also write Markdown.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Also draw the latencies, as FILE.svg.")
@click.option("--trace", "trace_file", type=click.Path(path_type=Path),
              help="Also trace one more run for Perfetto, as FILE.json or FILE.json.gz.")  # fmt: skip
def bench(
    configs: tuple[Path, ...], loaded: Loaded, is_comparison: bool, runs: int | None, timeout: float, style: str,
    json_file: Path | None, markdown_file: Path | None, plot_file: Path | None, trace_file: Path | None,
    **drawing: Any,
) -> None:  # fmt: skip
    """Measure speed, latencies, engine overhead and memory.

    Requests are token ids with fixed answer lengths, greedy. Prefill and decode are measured apart, with one
    sequence; the throughput is that of all requests sent at once. docs/benchmarking.md defines every figure.
    """
    from ..bench import show, tables
    from ..bench.trace import Tracer
    from ..errors import ConfigError

    if configs and not is_comparison:
        raise ConfigError(
            f"bench takes one configuration by --config, and {configs[0]} was given without it",
            hint="write --config FILE, or --compare A.yaml B.yaml",
        )
    if plot_file is not None and plot_file.suffix != ".svg":
        raise ConfigError(f"--plot writes SVG, not {plot_file.name!r}", hint="give it a name that ends in .svg")
    if trace_file is not None and not trace_file.name.endswith((".json", ".json.gz")):
        raise ConfigError(f"--trace writes JSON, not {trace_file.name!r}", hint="let its name end in .json or .json.gz")
    for path in (json_file, markdown_file, plot_file, trace_file):
        if path is not None and not path.parent.is_dir():  # said now, not after an hour of measuring
            raise ConfigError(f"{path} cannot be written: there is no directory {path.parent}")
    workload_for = _workload_source(**drawing)
    tracer = Tracer() if trace_file is not None else None
    if is_comparison:
        for option, path in (("--plot", plot_file), ("--trace", trace_file)):
            if path is not None:
                raise ConfigError(f"{option} shows one engine", hint="leave --compare away")
        if click.get_current_context().params["config_file"] is not None:
            raise ConfigError("--compare and --config both name configurations", hint="write --compare A.yaml B.yaml")
        comparison = _compare(configs, loaded, workload_for, runs or 5, timeout)
        heading, parts = show.circumstances(comparison), show.comparison_tables(comparison)
        seed_parts = show.comparison_seed_tables(comparison)
        document, failures = comparison.to_json(), comparison.failures
    else:
        report = _measure(loaded, workload_for, runs or 3, tracer)
        heading, parts = show.report_heading(report), show.report_tables(report)
        seed_parts = show.report_seed_tables(report)
        document, failures = report.to_json(), {}
    if style == "text":
        echo(tables.terminal(heading, parts))
    elif style == "markdown":
        echo(tables.markdown(heading, parts), end="")
    else:
        echo(tables.markdown("", seed_parts), end="")
    if json_file is not None:
        _write(json_file, json.dumps(document, indent=2) + "\n")
    if markdown_file is not None:
        _write(markdown_file, tables.markdown(heading, parts))
    if plot_file is not None:
        from ..bench.plot import svg

        _write(plot_file, svg(report.last_run, heading.splitlines()[0]))
    if trace_file is not None and tracer is not None:
        with _writing(trace_file):
            tracer.write(trace_file, {"machine": report.machine, "workload": report.workload, **report.subject})
        click.echo(f"trace of {tracer.num_steps} steps: {trace_file}; open it at https://ui.perfetto.dev", err=True)
    if failures:
        from ..bench.child import ChildFailed

        raise ChildFailed("; ".join(failures.values()))


def _workload_source(
    workload_file: Path | None, preset: str | None, **lengths: Any
) -> Callable[[int | None, int], Workload]:
    """What makes the workload, once the vocabulary's size and the longest sequence are known."""
    from ..bench.workload import PRESETS, Drawn, read
    from ..errors import ConfigError

    given = {name: value for name, value in lengths.items() if value is not None}
    sources = [
        text
        for text, is_given in (
            ("--workload", workload_file is not None),
            ("--preset", preset is not None),
            (", ".join(f"--{name.replace('_', '-')}" for name in sorted(given)), bool(given)),
        )
        if is_given
    ]
    if len(sources) > 1:
        raise ConfigError(f"{' and '.join(sources)} both say what to run", hint="give one of them")
    if workload_file is not None:
        workload = read(workload_file)
        return lambda vocab_size, max_len: workload
    return (PRESETS[preset] if preset is not None else Drawn(**given)).workload


def _measure(
    loaded: Loaded, workload_for: Callable[[int | None, int], Workload], runs: int, tracer: Tracer | None
) -> Report:
    from ..bench.report import measure
    from ..face import engine_from_config

    def describe(engine: Engine) -> dict[str, Any]:
        config, facts = loaded.config, dict(engine.info.description)
        return {
            "model": config.model,
            "runner": config.runner.type,
            "architecture": facts.pop("architecture", None),
            "dtype": facts.pop("dtype", None),
            "device": facts.pop("device", "CPU"),
            "max_num_seqs": engine.scheduler.max_num_seqs,
            "max_num_batched_tokens": engine.scheduler.max_num_batched_tokens,
            "facts": facts,
        }

    return measure(
        lambda: engine_from_config(loaded, {})[0], workload_for, runs=runs, describe=describe, on_progress=_progress,
        tracer=tracer,
    )  # fmt: skip


def _compare(
    files: tuple[Path, ...], loaded: Loaded, workload_for: Callable[[int | None, int], Workload], runs: int,
    timeout: float,
) -> Comparison:  # fmt: skip
    """Every file with the flags of this call on top; each is checked here before a child starts."""
    from ..bench.compare import compare
    from ..bench.worker import own_engine
    from ..config import leaves, load
    from ..errors import ConfigError

    if len(files) < 2:
        raise ConfigError(
            f"--compare takes two configurations or more, not {len(files)}",
            hint="for example: nanovllm bench --compare a.yaml b.yaml",
        )
    flags = {k: v for k, v in leaves(loaded.config) if loaded.origins.get(k) in ("command line", "--set")}
    contestants = [
        own_engine(name, load(file, overrides=flags, override_origin="command line").config)
        for name, file in zip(distinct([str(file) for file in files]), files, strict=True)
    ]
    return compare(contestants, workload_for, runs=runs, timeout=timeout, on_progress=_progress)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(text, err=True)


def _write(path: Path, text: str) -> None:
    with _writing(path):
        path.write_text(text, encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    from ..errors import ConfigError

    try:
        yield
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror or e}") from None
