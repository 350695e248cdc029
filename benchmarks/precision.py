"""What the precisions of a runner cost in accuracy: what `onnx_precision.py` and `torch_precision.py` have in common.

The text is the model's own: sampled in fp32 at temperature 1 from a start token, so that it is typical of the
model whatever that has learned, random weights included. Every precision then gives its distribution of the
next token at every position of it, and against fp32's that is

    KL          mean divergence from fp32's distribution, in nats; and of the worst position in a hundred
    top-1       how often the most likely token is the same
    perplexity  of the text: for fp32 the exponential of its entropy, and times exp(KL) for the others, on average
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm import LLM, SamplingParams
from nanovllm.batch import Batch, Sampling, ScheduledSeq
from nanovllm.components import build
from nanovllm.config import load
from nanovllm_models import load_checkpoint

Options = Mapping[str, object]  # of the configuration's `runner:` section
SAMPLING = Sampling(SamplingParams(temperature=0), (), frozenset(), 0, 0, True)
BLOCK = 16  # tokens of a KV block


class Score(NamedTuple):
    weight_bytes: int
    divergences: NDArray[np.float32]  # nats, of every position
    same: float  # share of positions with the same most likely token
    perplexity: float


def write_text(model: Path, runner: Options, sequences: int, tokens: int, seed: int) -> list[list[int]]:
    """Token ids of each sequence, start token included."""
    checkpoint = load_checkpoint(model)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, checkpoint.spec.vocab_size, sequences).tolist()
    if checkpoint.bos_id is not None:
        starts = [checkpoint.bos_id] * sequences
    params = [
        SamplingParams(temperature=1, seed=seed + i, max_tokens=tokens - 1, ignore_eos=True) for i in range(sequences)
    ]
    with LLM(str(model), runner=runner, max_model_len=tokens) as llm:
        outputs = llm.generate([[start] for start in starts], params)
    return [[start, *output.token_ids] for start, output in zip(starts, outputs, strict=True)]


def log_probabilities(model: Path, runner: Options, texts: list[list[int]]) -> tuple[int, list[NDArray[np.float32]]]:
    """Bytes of the weights; and of each text (len - 1, vocab): what is said before its last token."""
    length = len(texts[0])
    parts = build(
        load(
            environ={},
            overrides={
                "model": str(model), "runner": runner, "max_model_len": length, "max_num_seqs": 1,
                "max_num_batched_tokens": length, "cache": {"block_size": BLOCK, "num_blocks": -(-length // BLOCK)},
            },
        )
    )  # fmt: skip
    rows = []
    table = np.arange(-(-length // BLOCK), dtype=np.int32)[None]
    for text in texts:
        ids = np.array(text, np.int32)
        seq = ScheduledSeq(0, 0, ids, length, 0, length - 1, length - 1, table[0], SAMPLING, None)
        logits = np.array(np.from_dlpack(parts.runner.forward(Batch((seq,), table, BLOCK).packed)))  # a copy
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        rows.append(logits)
    weight_bytes = parts.runner.info.description["weight_bytes"]
    parts.runner.close()
    return weight_bytes, rows


def score(model: Path, texts: list[list[int]], exact: list[NDArray[np.float32]], runner: Options) -> Score:
    size, found = log_probabilities(model, runner, texts)
    divergences = [(np.exp(p) * (p - q)).sum(axis=1) for p, q in zip(exact, found, strict=True)]
    same = [p.argmax(axis=1) == q.argmax(axis=1) for p, q in zip(exact, found, strict=True)]
    said = [q[np.arange(len(q)), text[1:]] for q, text in zip(found, texts, strict=True)]
    return Score(size, np.concatenate(divergences), float(np.mean(same)), float(np.exp(-np.mean(said))))


def compare(doc: str, precisions: Mapping[str, Options]) -> None:
    """The command: a Markdown table of each model in each of the precisions, the first of which is fp32."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence, with its start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    runners = {name: {**options, "threads": args.threads} for name, options in precisions.items()}
    fp32 = next(iter(runners.values()))
    print("| model | weights | MiB | KL, mean | KL, worst of 100 | top-1 | perplexity |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for model in args.models:
        texts = write_text(model, fp32, args.sequences, args.tokens, args.seed)
        _, exact = log_probabilities(model, fp32, texts)
        for name, runner in runners.items():
            found = score(model, texts, exact, runner)
            worst = np.quantile(found.divergences, 0.99)
            print(
                f"| {model.name} | {name} | {found.weight_bytes / 2**20:.1f} | {found.divergences.mean():.5f} "
                f"| {worst:.4f} | {found.same:.1%} | {found.perplexity:.4g} |",
                flush=True,
            )
