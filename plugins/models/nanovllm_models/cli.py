"""The commands of this package: `nanovllm demo`, `export`, `inspect` and `pull`: their options and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nanovllm.cli import plugin_command, summary
from nanovllm.cli.ask import answer
from nanovllm.cli.options import EngineCommand, engine_options
from nanovllm.cli.terminal import echo, marks, printable
from nanovllm.plugins import discover

if TYPE_CHECKING:
    from nanovllm.config import Loaded

    from .inspect_model import Report

COUNTRIES = ("France", "Italy", "Germany", "Japan", "Spain", "England", "Russia", "China")
# Help for the formats of this project's own plugins; anybody else's shows its distribution's summary.
_FORMATS = {
    "onnx": "An ONNX graph, from a checkpoint.",
    "pt2": "A torch.export program, from a checkpoint.",
    "safetensors": "Safetensors, from pickled weights.",
    "torchscript": "A TorchScript program, from a checkpoint.",
}


@click.group()
def demo() -> None:
    """Small demonstrations with the embedded model."""


@demo.command(cls=EngineCommand)
@engine_options
def capitals(loaded: Loaded) -> None:
    """Ask for eight capitals, in one batch."""
    from nanovllm.llm import LLM

    questions = [f"What is the capital of {country}?" for country in COUNTRIES]
    with LLM.from_config(loaded) as llm:
        outputs, _, failure = answer(llm, questions, {})
    for question, output in zip(questions, outputs, strict=True):
        echo(f"Q: {question} A: {' '.join(output.text.split())}")
    if failure is not None:
        raise failure


class _Exporters(click.Group):
    """Its commands are the plugins of the group `exporters`; one is imported when it is invoked, never to list them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({found.name for found in discover("exporters")})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return plugin_command("exporters", name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formats = {
            found.name: _FORMATS.get(found.name) or summary(found.distribution) for found in discover("exporters")
        }
        with formatter.section("Formats"):
            formatter.write_dl(sorted(formats.items()) or [("none", "try: pip install 'nanovllm[onnx]'")])


@click.group(cls=_Exporters, subcommand_metavar="FORMAT [OPTIONS]")
def export() -> None:
    """Write a model in another format."""


@click.command()
@click.argument("repo")
@click.option(
    "--output", "--local-dir", "directory", required=True, type=click.Path(path_type=Path), help="Where the files go."
)
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@click.option("--onnx", is_flag=True, help="ONNX graphs and their data too.")
def pull(repo: str, directory: Path, revision: str, onnx: bool) -> None:
    """Download a model.

    REPO is a model id of the Hugging Face hub, such as gpt2 or Qwen/Qwen2.5-0.5B-Instruct. Weights come as
    safetensors, with the configuration and tokenizer files beside them; nothing that could carry code comes along. An
    interrupted download goes on when the command is run again. HF_ENDPOINT names another hub, HF_TOKEN lets you in.
    """
    from .pull import pull as pull_files

    done = marks().done
    files = pull_files(repo, directory, revision=revision, onnx=onnx, tell=lambda line: echo(f"{done} {line}"))
    echo(f"{directory}: {len(files)} files, {sum(f.size for f in files):,} bytes")


@click.command()
@click.argument("model")
@click.option("--context", type=click.IntRange(min=1), help="Tokens per sequence.  [default: the longest]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def inspect(ctx: click.Context, model: str, context: int | None, batch: int, as_json: bool) -> None:
    """Describe a model.

    MODEL is a directory, `demo`, or an .onnx file: what it is, what it takes in memory, which files are there and what
    is wrong with them. No weights are read, but an ONNX graph is loaded, to try what it can do. The exit status is 4 if
    the model cannot be used.
    """
    from nanovllm.plugins import resolve_model

    from .inspect_model import inspect_model

    _, path = resolve_model(model)
    report = inspect_model(path or Path(model), context, batch)
    if as_json:
        echo(json.dumps(report.to_json(), indent=2))
    else:
        _print_report(report)
    if not report.is_usable:
        ctx.exit(4)


def _print_report(report: Report) -> None:
    def say(line: str) -> None:
        echo(printable(line))

    def rows(title: str, table: dict[str, str]) -> None:
        if table:
            say(title)
            width = max(map(len, table))
            for key, value in table.items():
                say(f"  {key:<{width}}  {value}".rstrip())

    about = {} if report.program is None else {"Program": report.program}
    if (a := report.architecture) is not None:
        about |= {
            "Architecture": a.architecture,
            "Position encoding": a.positions,
            "Attention": a.attention,
            "Heads": f"{a.num_heads} query, {a.num_kv_heads} key/value, of {a.head_size}",
            "Block style": a.block,
            "Feed-forward": a.feed_forward,
            "Size": f"{a.num_layers} layers of {a.hidden_size}, {a.vocab_size} tokens, {a.max_positions} positions",
            "Parameters": f"{a.num_parameters:,}"
            + (f", {a.num_active_parameters:,} per token" if a.num_active_parameters < a.num_parameters else ""),
        }
    if (stored := report.stored) is not None:
        about["Stored as"] = f"{stored.dtype}, {stored.num_tensors} tensors, {_size(stored.num_bytes)}"
    rows(f"Model {report.directory}", about)
    if report.graph is not None:
        for title, table in report.graph.tables.items():
            rows(title, dict(table))
    if (m := report.memory) is not None:
        kv = m.kv_per_token["fp32"] * m.context * m.batch
        sums = f"{_size(m.weights['fp32'])} of weights + {_size(kv)} of KV cache = {_size(m.total)} in fp32"
        rows(
            "Memory",
            {
                "Weights": ", ".join(f"{name} {_size(size)}" for name, size in m.weights.items()),
                "KV cache per token": ", ".join(f"{name} {size:,} bytes" for name, size in m.kv_per_token.items()),
                f"{m.batch} x {m.context} tokens": sums,
            },
        )
    tokens = {}
    if report.tokenizer_vocab_size is not None:
        tokens["Tokenizer"] = f"{report.tokenizer_vocab_size} entries"
    if report.chat_template is not None:
        tokens["Chat template"] = f"from {report.chat_template}"
    defaults = {
        key: f"{', '.join(map(str, value)) if isinstance(value, tuple) else value}  (from {origin})"
        for key, (value, origin) in report.generation.items()
    }
    rows("Text", tokens | defaults)
    rows("Files", {file.name: f"{_size(file.size):>9}  {file.use or 'unexpected'}" for file in report.files})
    rows("Missing", dict.fromkeys(report.missing, ""))
    say("Findings" if report.findings else "Nothing is wrong with it.")
    for finding in report.findings:
        say(f"  {finding.level}: {finding.text}" + (f"; {finding.fix}" if finding.fix else ""))


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"
