"""Prefill and decode speed of the NumPy runner, as ratios to a plain NumPy GPT-2 in the same run.

    python benchmarks/numpy_runner.py [--layers 12] [--width 768] [--threads 2] [--rounds 5] [--cpu-time]
                                      [--transformers]

Builds a random GPT-2 of that size (the default is GPT-2 small, 124 million parameters) in a temporary
directory. `plain` is what one writes first: one sequence, a contiguous cache, the textbook formulas.
Each number is the best of the rounds; the two take turns, so that a busy machine slows both. On a machine that
others use, `--threads 1 --cpu-time` counts the time that the process ran instead of the time that passed.
`--transformers` lets transformers (torch, float32) take its turns too, one sequence and a batch of 8.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from nanovllm.batch import Batch, Sampling, ScheduledSeq
from nanovllm.hookspecs import CacheOptions, Context
from nanovllm.request import SamplingParams
from nanovllm_runner_numpy import plugin
from nanovllm_runner_numpy.runner import NumpyRunner

PROMPT = 512  # tokens
DECODE = 16  # steps per timing
VOCAB = 50257
HEAD = 64
SAMPLING = Sampling(SamplingParams(temperature=0), (), frozenset(), 0, 0, True)


def make_model(directory: Path, layers: int, width: int) -> None:
    config = {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_positions": 1024,
        "n_embd": width,
        "n_layer": layers,
        "n_head": width // HEAD,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCAB, width), "wpe.weight": (1024, width)}
    for i in range(layers):
        for name, out, into in (("attn.c_attn", 3, 1), ("attn.c_proj", 1, 1), ("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4)):
            shapes |= {f"h.{i}.{name}.weight": (into * width, out * width), f"h.{i}.{name}.bias": (out * width,)}
        shapes |= {f"h.{i}.ln_{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
    shapes |= {f"ln_f.{kind}": (width,) for kind in ("weight", "bias")}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    rng = np.random.default_rng(0)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for shape in shapes.values():
            file.write((rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05)).tobytes())


class Plain:
    """GPT-2 as in a tutorial: one sequence, a cache per layer."""

    def __init__(self, directory: Path) -> None:
        raw = (directory / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        self.w = {
            name: np.frombuffer(raw, np.float32, int(np.prod(t["shape"])), 8 + size + t["data_offsets"][0])
            .reshape(t["shape"])
            .copy()
            for name, t in header.items()
        }
        config = json.loads((directory / "config.json").read_text())
        self.layers, self.heads = config["n_layer"], config["n_head"]
        self.reset()

    def reset(self) -> None:
        self.cache: list[tuple[np.ndarray, np.ndarray] | None] = [None] * self.layers

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def forward(self, ids: np.ndarray, start: int) -> np.ndarray:
        x = self.w["wte.weight"][ids] + self.w["wpe.weight"][start : start + len(ids)]
        mask = np.triu(np.full((len(ids), start + len(ids)), -np.inf, np.float32), start + 1)
        for i in range(self.layers):
            q, k, v = np.split(self.linear(self.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
            q, k, v = (t.reshape(len(ids), self.heads, HEAD).transpose(1, 0, 2) for t in (q, k, v))
            if self.cache[i] is not None:
                k, v = (np.concatenate([old, new], 1) for old, new in zip(self.cache[i], (k, v), strict=True))
            self.cache[i] = (k, v)
            scores = q @ k.transpose(0, 2, 1) / np.float32(HEAD**0.5) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = scores / scores.sum(-1, keepdims=True) @ v
            x = x + self.linear(mixed.transpose(1, 0, 2).reshape(x.shape), f"h.{i}.attn.c_proj")
            h = self.linear(self.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            h = np.float32(0.5) * h * (1 + np.tanh(np.float32(0.7978845608) * (h + np.float32(0.044715) * h * h * h)))
            x = x + self.linear(h, f"h.{i}.mlp.c_proj")
        return self.norm(x[-1:], "ln_f") @ self.w["wte.weight"].T


class Transformers:
    """The same model in transformers: a prompt that fills the cache of n sequences, then tokens one by one."""

    def __init__(self, directory: Path, threads: int | None) -> None:
        import torch
        import transformers

        if threads is not None:
            torch.set_num_threads(threads)
        self._torch = torch
        self._model = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()

    def prefill(self, tokens: np.ndarray) -> None:
        """tokens (n, T) into an empty cache."""
        self._cache = None
        self._forward(tokens)

    def decode(self, tokens: np.ndarray, num_seqs: int) -> None:
        """One step per token; the cache grows."""
        for token in tokens:
            self._forward(np.full((num_seqs, 1), token))

    def _forward(self, tokens: np.ndarray) -> None:
        ids = self._torch.from_numpy(tokens.astype(np.int64))
        with self._torch.no_grad():
            out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values


class Paged:
    """The runner, driven by hand: every sequence has its blocks, dealt out in turns as an engine does."""

    def __init__(self, runner: NumpyRunner, num_seqs: int) -> None:
        self.runner = runner
        self.size = runner.info.kv.block_size
        per_seq = 1024 // self.size
        self.table = np.arange(num_seqs * per_seq, dtype=np.int32).reshape(per_seq, num_seqs).T.copy()

    def step(self, context: np.ndarray, start: int, lanes: range) -> np.ndarray:
        seqs = tuple(
            ScheduledSeq(s, s, context, len(context), start, len(context), 1, self.table[s], SAMPLING, None)
            for s in lanes
        )
        return self.runner.forward(Batch(seqs, self.table, self.size).packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--transformers", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    tokens = np.random.default_rng(1).integers(0, VOCAB, 1024).astype(np.int32)
    with tempfile.TemporaryDirectory() as name, threadpool_limits(args.threads, user_api="blas"):
        make_model(Path(name), args.layers, args.width)
        plain = Plain(Path(name))
        began = clock()
        runner = plugin.create_runner(
            Context(
                options=None, model=name, path=Path(name), cache=CacheOptions(num_blocks=32 * 64), max_num_seqs=32,
                max_num_batched_tokens=PROMPT, max_model_len=None, threads=args.threads,
            )
        )  # fmt: skip
        facts = runner.info.description
        print(f"{facts['parameters']:,} parameters loaded in {clock() - began:.2f} s")
        print(f"{facts['blas']}, {facts['threads']} threads")
        runs: dict[str, list[float]] = {}

        def timed(label: str, work: Callable[[], object]) -> None:
            began = clock()
            work()
            runs.setdefault(label, []).append(clock() - began)

        # All three share the pool: what a batch finds in it is only of the right size, not of the right prompt.
        batches = {n: Paged(runner, n) for n in (1, 8, 32)}
        for pool in runner._pools:
            pool.k[...] = pool.v[...] = np.float32(0.1)
        for start, stop in ((0, PROMPT), (PROMPT, PROMPT + 1)):
            ours = batches[1].step(tokens[:stop], start, range(1))
            np.testing.assert_allclose(ours, plain.forward(tokens[start:stop], start), rtol=0, atol=1e-3)
        steps = range(PROMPT, PROMPT + DECODE)

        def decode(n: int) -> list[np.ndarray]:
            return [batches[n].step(tokens[: i + 1], i, range(n)) for i in steps]

        peer = Transformers(Path(name), args.threads) if args.transformers else None
        for _ in range(args.rounds):
            plain.reset()
            timed("plain prefill", lambda: plain.forward(tokens[:PROMPT], 0))
            timed("prefill", lambda: batches[1].step(tokens[:PROMPT], 0, range(1)))
            timed("plain decode", lambda: [plain.forward(tokens[i : i + 1], i) for i in steps])
            for n in batches:
                timed(f"decode {n}", partial(decode, n))
            for n in (1, 8) if peer is not None else ():
                timed(f"transformers prefill {n}", partial(peer.prefill, tokens[None, :PROMPT].repeat(n, 0)))
                timed(f"transformers decode {n}", partial(peer.decode, tokens[PROMPT : PROMPT + DECODE], n))
        for kind, work in (("prefill", PROMPT), ("decode", DECODE)):
            base = work / min(runs[f"plain {kind}"])
            for label in (label for label in runs if kind in label):
                num = int(label.split()[-1]) if label[-1].isdigit() else 1
                speed = num * work / min(runs[label])
                name = label if label.startswith(("plain", "transformers")) else f"runner {label}"
                print(f"{name:<26} {speed:8.1f} tok/s  {speed / base:6.2f} x plain")


if __name__ == "__main__":
    main()
