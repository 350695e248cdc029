"""ExampleJaxRunner: a checkpoint and a KV pool on a JAX device, and steps cut into few shapes.

Knows no scheduler and no sampler; `model.py` computes.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from nanovllm.batch import IntArray, Packed, Paged, RunnerInfo
from nanovllm.errors import ConfigError, UnsupportedModelError
from nanovllm.hookspecs import Context
from nanovllm.runner import LogitsRunner
from nanovllm_models import Block, DecoderSpec, FeedForward, load_checkpoint, model_len, num_kv_blocks
from numpy.typing import NDArray

from .model import embed, layer, logits


class ExampleJaxRunner(LogitsRunner):
    """Raises ModelError for a model that cannot be used, ConfigError for a device or sizes that cannot be had."""

    def __init__(self, ctx: Context) -> None:
        # 1. What cannot be done is refused before anything is loaded.
        if ctx.threads is not None:
            raise ConfigError("runner 'example-jax' cannot limit JAX's threads", hint="remove runner.threads")
        device = find_device(ctx.options.device)
        checkpoint = load_checkpoint(ctx.path or ctx.model)
        spec, block_size = checkpoint.spec, ctx.cache.block_size
        refuse_what_is_not_computed(spec)
        # 2. Sizes, by the rules of every local runner.
        max_model_len = model_len(checkpoint.name, spec.max_positions, ctx.max_model_len)
        num_blocks = num_kv_blocks(4 * spec.kv_size, ctx.cache, ctx.max_num_seqs, max_model_len)
        # 3. Weights and pool, on the device.
        self._spec, self._max_len, self._block_size = spec, max_model_len, block_size
        weights = {n: jax.device_put(t.to_float32(), device) for n, t in checkpoint.weights.items()}
        self._outer = {n: w for n, w in weights.items() if not n.startswith("layers.")}
        self._layers = [
            {n.removeprefix(f"layers.{i}."): w for n, w in weights.items() if n.startswith(f"layers.{i}.")}
            for i in range(spec.num_layers)
        ]
        self._num_slots = num_blocks * block_size
        shape = (self._num_slots, spec.attention.num_kv_heads, spec.attention.head_size)
        zeros = partial(jnp.zeros, shape, jnp.float32, device=device)
        self._pool = [[zeros(), zeros()] for _ in range(spec.num_layers)]  # K and V of each layer
        self._info = RunnerInfo(
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=ctx.max_num_seqs,
            kv=Paged(block_size, num_blocks),
            eos_ids=checkpoint.eos_ids,
            description={**checkpoint.facts, "dtype": "float32", "device": f"{device.platform}:{device.id}"},
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def forward(self, packed: Packed) -> NDArray[np.float32]:
        """Logits (R, vocab) float32 for `packed.rows`; K and V of all T tokens go into the pool."""
        counts = np.diff(packed.q_start)  # (S,) new tokens
        out = np.empty((len(packed.rows), self._spec.vocab_size), np.float32)
        # A rectangle wastes nothing if all its rows are equally long: those that generate go together, and each
        # sequence that computes a piece of its prompt goes alone.
        for group in (np.flatnonzero(counts == 1), *np.flatnonzero(counts > 1)[:, None]):
            if len(group):
                self._compute(packed, group, int(counts[group[0]]), out)
        return out

    def _compute(self, packed: Packed, group: NDArray[np.intp], count: int, out: NDArray[np.float32]) -> None:
        """The sequences `group`, `count` new tokens each; fills their rows of `out` (R, vocab)."""
        # 1. Which tokens of the step these are, (S, Q), and which of the wanted rows are theirs.
        first = packed.q_start[group]
        tokens = first[:, None] + np.arange(count)
        wanted = np.flatnonzero(np.isin(packed.rows, tokens))
        owner = np.searchsorted(first, packed.rows[wanted], side="right") - 1  # which of the group
        # 2. jit compiles once for each shape, so there must be few: every axis is padded to a power of two, and what is
        #    small to one size.
        num_seqs, num_tokens = bucket(len(group)), 1 if count == 1 else bucket(max(count, 16))
        num_blocks = -(-int(packed.kv_lens[group].max()) // self._block_size)
        width = bucket(max(num_blocks, 64 // self._block_size))
        tables = padded(np.maximum(packed.tables[group, :num_blocks], 0), (num_seqs, width))
        offsets = np.arange(self._block_size, dtype=np.int32)
        context = (tables[:, :, None] * self._block_size + offsets).reshape(num_seqs, -1)  # (S, C) slots
        ids = padded(packed.input_ids[tokens], (num_seqs, num_tokens))
        positions = padded(packed.positions[tokens], (num_seqs, num_tokens))
        slots = padded(packed.slots[tokens], (num_seqs, num_tokens), fill=self._num_slots)  # past the end: dropped
        kv_lens = padded(packed.kv_lens[group], (num_seqs,))
        rows = owner * num_tokens + packed.rows[wanted] - first[owner]
        # 3. The forward pass.
        with jax.default_matmul_precision("highest"):  # float32 means float32, on a GPU too
            x = embed(self._spec, self._outer, ids, positions)
            for i, (rotary, mlp) in enumerate(zip(self._spec.attention.rotary, self._spec.mlps, strict=True)):
                x, *self._pool[i] = layer(
                    self._spec, rotary, mlp, self._max_len, self._layers[i], *self._pool[i],
                    x, positions, slots, context, kv_lens,
                )  # fmt: skip
            if len(wanted):
                rows = padded(rows, (bucket(max(len(rows), num_seqs)),))
                out[wanted] = np.asarray(logits(self._spec, self._outer, x, rows))[: len(wanted)]

    def close(self) -> None:
        self._outer, self._layers, self._pool = {}, [], []


def find_device(platform: str) -> jax.Device:
    """The first device of the platform that was asked for. Raises ConfigError; there is no fallback."""
    try:
        return jax.devices(platform)[0]
    except RuntimeError as e:
        raise ConfigError(
            f"runner 'example-jax' finds no {platform} here: {e}",
            hint="install JAX for it (https://docs.jax.dev/en/latest/installation.html), or set runner.device: cpu",
        ) from None


def refuse_what_is_not_computed(spec: DecoderSpec) -> None:
    """Raises UnsupportedModelError naming the first field of the spec that `model.py` does not look at."""
    attention = replace(spec.attention, qk_norm=None, alibi=None, soft_cap=None, windows=(None,) * spec.num_layers)
    plain = replace(
        spec,
        block=Block(),
        lm_head_bias=False,
        embedding_scale=1.0,
        residual_scale=1.0,
        logits_scale=1.0,
        logits_soft_cap=None,
        mlps=tuple(mlp for mlp in spec.mlps if isinstance(mlp, FeedForward)),
    )
    for given, computed in ((spec.attention, attention), (spec, plain)):
        for field in fields(given):
            if getattr(given, field.name) != getattr(computed, field.name):
                raise UnsupportedModelError(
                    f"runner 'example-jax' does not compute {field.name} of architecture {spec.architecture!r}",
                    hint="use another runner, such as numpy",
                )


def bucket(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()


def padded(array: NDArray[np.integer], shape: tuple[int, ...], fill: int = 0) -> IntArray:
    """The array in the corner of a larger one, int32."""
    out = np.full(shape, fill, np.int32)
    out[tuple(slice(n) for n in array.shape)] = array
    return out
