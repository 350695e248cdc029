"""`nanovllm export onnx`: its options and what it prints."""

from __future__ import annotations

import shlex
import sys

import click

from nanovllm.cli.terminal import echo, marks
from nanovllm.hookspecs import CacheOptions


@click.command("onnx")
@click.option("-m", "--model", required=True, help="A checkpoint's directory, or demo.")
@click.option("-o", "--output", required=True, help="The directory to write.")
@click.option(
    "-p", "--weights", "--dtype", "--precision", type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    help="Precision of the weights.  [default: fp32 for the cpu, else fp16]",
)  # fmt: skip
@click.option("--int4-block", type=click.Choice(["32", "128"]), help="Weights that share a scale.  [default: 32]")
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens per sequence.  [default: the model's]")
@click.option(
    "--block-size", type=click.IntRange(min=1), default=CacheOptions().block_size, show_default=True,
    help="Tokens per KV block.",
)  # fmt: skip
@click.option(
    "-e", "--device", type=click.Choice(["cpu", "cuda", "directml", "dml"]), default="cpu", show_default=True,
    help="Where it will run.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an earlier export.")
def export_onnx(
    model: str, output: str, weights: str | None, int4_block: str | None, max_length: int | None, block_size: int,
    device: str, force: bool,
) -> None:  # fmt: skip
    """Write a checkpoint as an ONNX model.

    The directory gets model.onnx with its weights beside it, the tokenizer's files and model_info.json: everything that
    `--runner onnx` needs to run it. No torch is involved, and equal checkpoints give equal files. The options of
    onnxruntime-genai's model builder (-m -o -p -e) are understood.
    """
    from nanovllm_models.export_files import describe

    from .exporter import export

    is_terminal = sys.stderr.isatty()

    def tell(name: str) -> None:
        click.echo(f"\r\x1b[K{name}", nl=False, err=True)

    try:
        path = export(
            model,
            output,
            weights=weights,
            int4_block=None if int4_block is None else int(int4_block),
            max_length=max_length,
            block_size=block_size,
            device=device,
            force=force,
            **({"tell": tell} if is_terminal else {}),
        )
    finally:
        if is_terminal:
            click.echo("\r\x1b[K", nl=False, err=True)
    echo(f"{marks().done} {output}: {describe(path)}")
    sets = [] if block_size == CacheOptions().block_size else [f"--set cache.block_size={block_size}"]
    if device != "cpu":
        sets.append(f"--set runner.device={device}")
    echo(" ".join(["Ask it: nanovllm ask --runner onnx --model", shlex.quote(output), *sets, '"..."']))
