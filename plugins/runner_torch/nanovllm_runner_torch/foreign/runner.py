"""`ForeignRunner`: from somebody's TorchScript or torch.export archive and the files beside it to a runner of lanes.

Logits come to the host, where the core's sampler draws from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from nanovllm.batch import FloatArray, Packed
from nanovllm.errors import ConfigError, UnsupportedModelError
from nanovllm.hookspecs import Context
from nanovllm.threads import available_threads
from nanovllm_models.facts import read_facts
from nanovllm_models.lanes import LanesRunner, look, plain_ways

from ..archive import Archive, open_archive
from ..device import find_device, find_dtype, use_threads
from .decoder import TorchDecoder, name_of
from .exported import open_exported
from .script import open_script


class ForeignRunner(LanesRunner):
    """Raises ModelError for a model that cannot be used, ConfigError for what cannot be met or was not allowed."""

    def __init__(self, ctx: Context, archive: Archive) -> None:
        options = ctx.options
        device = find_device(options.device)
        if options.weights != "auto":
            raise ConfigError(
                f"runner.weights is {options.weights!r}, but {archive.path.name} brings its own weights",
                hint="leave runner.weights out, or name the checkpoint that the model was made from",
            )
        self._threads = ctx.threads or available_threads()
        use_threads(self._threads)
        model = open_archive(archive, options.allow_code_in, device)
        wanted = None if options.dtype == "auto" else find_dtype(options.dtype, device)
        if isinstance(model, torch.export.ExportedProgram):
            dtype = _main_dtype(model.state_dict.values())
            if wanted not in (None, dtype):
                raise ConfigError(
                    f"runner.dtype is {options.dtype!r}, but {archive.path} was exported in {name_of(dtype)}",
                    hint="leave runner.dtype out, or export the model again",
                )
            decoder, (max_rows, max_columns) = open_exported(model, archive.path, device, dtype)
            if max_rows is not None and max_rows < ctx.max_num_seqs:
                raise ConfigError(
                    f"scheduler.max_num_seqs is {ctx.max_num_seqs}, but {archive.path} was exported for at most "
                    f"{max_rows} sequences in a run",
                    hint=f"set scheduler.max_num_seqs to {max_rows} or less, or export the model again",
                )
            tensors = [*model.state_dict.values(), *model.constants.values()]
        else:
            max_columns = None
            decoder, dtype = _open_converted(model, archive, device, wanted)
            tensors = [*model.parameters(), *model.buffers()]
        vocab_size, _ = look(decoder)
        limits = [n for n in (archive.max_len, max_columns) if n is not None]
        facts = read_facts(archive.directory, archive.path, vocab_size, context_length=min(limits, default=None))
        description = {
            "graph": archive.path.name,
            "format": archive.kind,
            "style": "past and present" if decoder.past else "no past",
            "dtype": name_of(dtype),
            "weight_bytes": sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)),
            "torch": torch.__version__,
            "device": str(device),
            "threads": self._threads,
        }
        super().__init__(ctx, decoder, plain_ways(decoder), facts, description)

    def forward(self, packed: Packed) -> FloatArray:
        use_threads(self._threads)
        return super().forward(packed)


def _open_converted(
    model: torch.jit.ScriptModule, archive: Archive, device: torch.device, wanted: torch.dtype | None
) -> tuple[TorchDecoder, torch.dtype]:
    """In its own type, or in the one that is wanted, where the model lets it."""
    model.eval()
    own = _main_dtype([*model.parameters(), *model.buffers()])
    if wanted is not None:
        model.to(wanted)
    dtype = _main_dtype([*model.parameters(), *model.buffers()])
    try:
        return open_script(model, archive.path, archive.directory, device, dtype), dtype
    except UnsupportedModelError as e:
        if dtype == own:
            raise
        raise ConfigError(
            f"{archive.path} is in {name_of(own)}, and does not run in {name_of(dtype)}: {e.message}",
            hint="leave runner.dtype out, or export the model in that type",
        ) from e


def _main_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The floating type of most numbers; float32 where there are none."""
    count: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            count[tensor.dtype] += tensor.numel()
    return next((dtype for dtype, _ in count.most_common(1)), torch.float32)
