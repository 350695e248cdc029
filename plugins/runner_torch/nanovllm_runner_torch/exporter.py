"""`export_program`: a checkpoint -> a directory with one program for torch, the tokenizer, and the proof that it works.

What was written is opened again and run, in steps of different lengths over a padded batch, and must give the
logits that the runner computes from the checkpoint itself. Knows no option of a command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.errors import ModelError
from nanovllm.hookspecs import CacheOptions, Context
from nanovllm_models import Checkpoint, Experts
from nanovllm_models.export_files import copy_companions, directory_for, find_free_place, open_source
from nanovllm_models.torch_files import NOTE

from .archive import find_archive, note_of, open_archive, torch_jit_warns_of_its_age
from .device import DTYPES
from .exported_module import ExportedDecoder
from .options import TorchOptions
from .runner import TorchRunner, first_step
from .weights import Weights

FILES = {"pt2": "model.pt2", "torchscript": "model.pt"}  # by kind
# Of the largest logit: what rounding may change. Two orders of bf16 products differ by some of its steps of 2**-8.
TOLERANCES = {"fp32": 1e-4, "bf16": 2**-4}
PROMPT = 24  # tokens that are compared
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Exported:
    directory: Path
    difference: float  # the largest of a logit from the runner's
    largest: float  # logit


def export_program(
    model: str | Path, output: str | Path, *, kind: str = "pt2", dtype: str = "fp32", max_length: int | None = None
) -> Exported:
    """Write the directory `output`, whole or not at all.

    `model` is a checkpoint's directory, or `demo`; `kind` one of FILES; `dtype` one of TOLERANCES. `max_length`
    tokens of a prompt and its answer at most, by default as many as the model has positions.

    Raises ConfigError for a wish that cannot be met and a place that cannot be written, ModelError for a checkpoint
    that cannot be used and for a program that computes something else.
    """
    checkpoint, max_len = open_source(str(model), max_length)
    target = find_free_place(output)

    # The runner's logits first: it refuses what it cannot compute, and its copy of the weights is gone after that.
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, min(PROMPT, max_len), np.int32)
    wanted = _logits_of_runner(checkpoint, dtype, max_len, ids)
    with directory_for(target) as part:
        path = part / FILES[kind]
        _write(checkpoint, kind, dtype, max_len, path)
        copy_companions(checkpoint.path, part)
        checkpoint.info.write(part)
        differences = _differences(path, checkpoint, dtype, ids, wanted)
        difference, largest = differences.max().item(), wanted.abs().max().item()
        # In bf16 a router that hesitates may choose another expert: some tokens are then off by more than rounding.
        is_mixture = any(isinstance(mlp, Experts) for mlp in checkpoint.spec.mlps)
        usual = differences.median().item() if is_mixture and dtype == "bf16" else difference
        if not usual <= TOLERANCES[dtype] * max(1.0, largest):  # also where one of them is no number
            raise ModelError(
                f"the {dtype} program that torch {torch.__version__} recorded of {checkpoint.name} gives other logits "
                f"than the runner: they differ by up to {difference:.2g} where the largest is {largest:.2g}",
                hint="run the checkpoint itself, and report this with its config.json",
            )
    return Exported(target, difference, largest)


def _logits_of_runner(checkpoint: Checkpoint, dtype: str, max_len: int, ids: np.ndarray) -> Tensor:
    """(L, vocab) of the tokens `ids` (L,) int32, in one step."""
    num = len(ids)
    context = Context(
        options=TorchOptions(device="cpu", dtype=dtype),
        model=checkpoint.name,
        path=checkpoint.path,
        cache=CacheOptions(block_size=num, num_blocks=1),
        max_num_seqs=1,
        max_num_batched_tokens=num,
        max_model_len=max_len,
        threads=None,
    )
    runner = TorchRunner(context)
    try:
        packed = first_step(num, num)
        return runner.forward(packed._replace(input_ids=ids, rows=packed.positions)).clone()
    finally:
        runner.close()


def _write(checkpoint: Checkpoint, kind: str, dtype: str, max_len: int, path: Path) -> None:
    module = ExportedDecoder(checkpoint.spec, Weights(checkpoint.weights, DTYPES[dtype], CPU, False), max_len).eval()
    extra = {NOTE: note_of(max_len)}
    # Sizes that differ from each other and from 0 and 1, lest one is taken for another, or for a constant.
    tokens, past = torch.zeros((2, 3), dtype=torch.int64), _empty_past(checkpoint, DTYPES[dtype], 2, 4)
    arguments = (tokens, torch.ones((2, 7), dtype=torch.int64), torch.arange(4, 7).repeat(2, 1), *past)
    if kind == "torchscript":
        with torch_jit_warns_of_its_age(), torch.no_grad():
            torch.jit.save(torch.jit.trace(module, arguments, check_trace=False), path, _extra_files=extra)
        return
    from torch.fx.experimental import _config

    varies = torch.export.Dim.DYNAMIC
    sizes = [{0: varies, 1: varies}] * 3
    # Without this switch a size that varies is taken for at least 2, and the program insists on it: no single
    # sequence, no single token, no empty past.
    with _config.patch(backed_size_oblivious=True):
        shapes = (*sizes, tuple({0: varies, 2: varies} for _ in past))
        program = torch.export.export(module, arguments, dynamic_shapes=shapes)
    torch.export.save(program, str(path), extra_files=extra)


def _differences(path: Path, checkpoint: Checkpoint, dtype: str, ids: np.ndarray, wanted: Tensor) -> Tensor:
    """Of each token that the file computes, (n,): how far its logits are from those wanted, (L, vocab), at most.

    Two sequences begin with `ids`; the second falls behind by a token in every step that is long enough to pad it.
    """
    archive = find_archive(path)
    assert archive is not None, "a file is an archive or an error"
    program: Any = open_archive(archive, [path.parent], CPU)
    run = program if archive.kind == "torchscript" else program.module()
    steps = [n for n in (1, (len(ids) - 1) // 2, len(ids) - 1 - (len(ids) - 1) // 2) if n]
    past = _empty_past(checkpoint, DTYPES[dtype], 2, 0)
    mask = torch.zeros((2, 0), dtype=torch.int64)
    done, differences = [0, 0], []
    for num in steps:
        lens = [num, max(1, num - 1)]
        new = (torch.arange(num) < torch.tensor(lens)[:, None]).long()  # (2, num)
        mask = torch.cat((mask, new), 1)
        tokens = torch.zeros_like(new)
        for row, (start, length) in enumerate(zip(done, lens, strict=True)):
            tokens[row, :length] = torch.from_numpy(ids[start : start + length])
        positions = (mask.cumsum(1) - 1)[:, -num:]
        try:
            with torch.inference_mode():
                logits, *past = run(tokens, mask, positions, *past)
        except Exception as e:  # torch has no type for "the program was recorded with other sizes in mind"
            raise ModelError(
                f"the program that torch {torch.__version__} recorded of {checkpoint.name} does not run with {num} new "
                f"tokens after {mask.shape[1] - num}: {(str(e).splitlines() or [type(e).__name__])[0]:.200}",
                hint="run the checkpoint itself, and report this with its config.json",
            ) from e
        for row, (start, length) in enumerate(zip(done, lens, strict=True)):
            differences.append((logits[row, :length] - wanted[start : start + length]).abs().amax(1))  # NaN stays
            done[row] += length
    return torch.cat(differences)


def _empty_past(checkpoint: Checkpoint, dtype: torch.dtype, batch: int, length: int) -> list[Tensor]:
    attention = checkpoint.spec.attention
    shape = (batch, attention.num_kv_heads, length, attention.head_size)
    return [torch.zeros(shape, dtype=dtype) for _ in range(2 * checkpoint.spec.num_layers)]
