"""`nanovllm export pt2`, `export torchscript` and `export safetensors`: their options and what they print."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nanovllm.cli.terminal import echo, marks


def _program_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--max-length", type=click.IntRange(min=1), help="Tokens per sequence.  [default: the model's]"),
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "bf16"]),
            default="fp32",
            show_default=True,
            help="What it computes in.",
        ),
        click.option("-o", "--output", required=True, help="The directory to write."),
        click.option("-m", "--model", required=True, help="A checkpoint's directory, or demo."),
    ):
        command = option(command)
    return command


@click.command("pt2")
@_program_options
def export_pt2(model: str, output: str, dtype: str, max_length: int | None) -> None:
    """Write a checkpoint as a torch.export program.

    The directory gets model.pt2, the tokenizer's files and model_info.json: everything that `--runner torch` needs to
    run it. The file is opened again and must give the logits that the runner computes from the checkpoint.
    """
    _export("pt2", model, output, dtype, max_length)


@click.command("torchscript")
@_program_options
def export_torchscript(model: str, output: str, dtype: str, max_length: int | None) -> None:
    """Write a checkpoint as TorchScript.

    For programs that load TorchScript with LibTorch; torch itself calls it deprecated, so prefer pt2 elsewhere. The
    directory gets model.pt, the tokenizer's files and model_info.json. The file is opened again and must give the
    logits that the runner computes from the checkpoint.
    """
    _export("torchscript", model, output, dtype, max_length)


def _export(kind: str, model: str, output: str, dtype: str, max_length: int | None) -> None:
    from .exporter import export_program

    made = export_program(model, output, kind=kind, dtype=dtype, max_length=max_length)
    _done(output, made.directory)
    echo(f"Its logits differ from the runner's by at most {made.difference:.2g}; the largest is {made.largest:.2g}.")
    allowed = shlex.quote(f"runner.allow_code_in={json.dumps([str(made.directory)])}")
    echo(f'Ask it: nanovllm ask --runner torch --model {shlex.quote(output)} --set {allowed} "..."')


@click.command("safetensors")
@click.option("-m", "--model", required=True, help="A directory with pickled weights, or a file of them.")
@click.option("-o", "--output", required=True, help="The directory to write.")
@click.option(
    "--allow-code-in", multiple=True, type=click.Path(path_type=Path),
    help="Files may be unpickled in this place. Only for files whose maker you trust.",
)  # fmt: skip
def export_safetensors(model: str, output: str, allow_code_in: tuple[Path, ...]) -> None:
    """Write pickled weights as safetensors.

    For checkpoints that come as .bin, .pt or .pth. torch reads them with everything but tensors forbidden. Names and
    types of the tensors stay as they are, and the tokenizer's files come along.
    """
    from .conversion import convert

    path = convert(model, output, allow_code_in, tell=lambda line: echo(f"{marks().done} {line}"))
    _done(output, path)


def _done(output: str, path: Path) -> None:
    from nanovllm_models.export_files import describe

    echo(f"{marks().done} {output}: {describe(path)}")
