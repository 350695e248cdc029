"""What each precision of the ONNX runner costs in accuracy, as a Markdown table.

    python benchmarks/onnx_precision.py MODEL... [--sequences 8] [--tokens 128] [--seed 0] [--threads 2]

MODEL is a checkpoint's directory. The text is the model's own: sampled in fp32 at temperature 1 from a start token,
so that it is typical of the model whatever that has learned, random weights included. Every precision then gives
its distribution of the next token at every position of it, and against fp32's that is

    KL          mean divergence from fp32's distribution, in nats; and of the worst position in a hundred
    top-1       how often the most likely token is the same
    perplexity  of the text: for fp32 the exponential of its entropy, and times exp(KL) for the others, on average
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm import LLM, SamplingParams
from nanovllm.batch import Batch, Sampling, ScheduledSeq
from nanovllm.hookspecs import CacheOptions, Context
from nanovllm_models import load_checkpoint
from nanovllm_runner_onnx import plugin
from nanovllm_runner_onnx.options import OnnxOptions

PRECISIONS = {
    "fp32": {"weights": "fp32"},
    "int8": {"weights": "int8"},
    "int4, block 32": {"weights": "int4", "int4_block": 32},
    "int4, block 128": {"weights": "int4", "int4_block": 128},
}
SAMPLING = Sampling(SamplingParams(temperature=0), (), frozenset(), 0, 0, True)
BLOCK = 16  # tokens of a KV block


class Score(NamedTuple):
    weight_bytes: int
    divergences: NDArray[np.float32]  # nats, of every position
    same: float  # share of positions with the same most likely token
    perplexity: float


def write_text(model: Path, sequences: int, tokens: int, seed: int, threads: int) -> list[list[int]]:
    """Token ids of each sequence, start token included."""
    checkpoint = load_checkpoint(model)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, checkpoint.spec.vocab_size, sequences).tolist()
    if checkpoint.bos_id is not None:
        starts = [checkpoint.bos_id] * sequences
    params = [
        SamplingParams(temperature=1, seed=seed + i, max_tokens=tokens - 1, ignore_eos=True) for i in range(sequences)
    ]
    with LLM(str(model), runner={"type": "onnx", "threads": threads}, max_model_len=tokens) as llm:
        outputs = llm.generate([[start] for start in starts], params)
    return [[start, *output.token_ids] for start, output in zip(starts, outputs, strict=True)]


def log_probabilities(
    model: Path, options: dict[str, object], texts: list[list[int]], threads: int
) -> tuple[int, list[NDArray[np.float32]]]:
    """Bytes of the weights; and of each text (len - 1, vocab): what is said before its last token."""
    length = len(texts[0])
    context = Context(
        options=OnnxOptions.model_validate(options), model=str(model), path=model,
        cache=CacheOptions(block_size=BLOCK, num_blocks=-(-length // BLOCK)), max_num_seqs=1,
        max_num_batched_tokens=length, max_model_len=length, threads=threads,
    )  # fmt: skip
    runner = plugin.create_runner(context)
    rows = []
    table = np.arange(-(-length // BLOCK), dtype=np.int32)[None]
    for text in texts:
        ids = np.array(text, np.int32)
        seq = ScheduledSeq(0, 0, ids, length, 0, length - 1, length - 1, table[0], SAMPLING, None)
        logits = runner.forward(Batch((seq,), table, BLOCK).packed)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        rows.append(logits)
    weight_bytes = runner.info.description["weight_bytes"]
    runner.close()
    return weight_bytes, rows


def score(
    model: Path, texts: list[list[int]], exact: list[NDArray[np.float32]], options: dict[str, object], threads: int
) -> Score:
    size, found = log_probabilities(model, options, texts, threads)
    divergences = [(np.exp(p) * (p - q)).sum(axis=1) for p, q in zip(exact, found, strict=True)]
    same = [p.argmax(axis=1) == q.argmax(axis=1) for p, q in zip(exact, found, strict=True)]
    said = [q[np.arange(len(q)), text[1:]] for q, text in zip(found, texts, strict=True)]
    return Score(size, np.concatenate(divergences), float(np.mean(same)), float(np.exp(-np.mean(said))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence, with its start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print("| model | weights | MiB | KL, mean | KL, worst of 100 | top-1 | perplexity |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for model in args.models:
        texts = write_text(model, args.sequences, args.tokens, args.seed, args.threads)
        _, exact = log_probabilities(model, PRECISIONS["fp32"], texts, args.threads)
        for name, options in PRECISIONS.items():
            found = score(model, texts, exact, options, args.threads)
            worst = np.quantile(found.divergences, 0.99)
            print(
                f"| {model.name} | {name} | {found.weight_bytes / 2**20:.1f} | {found.divergences.mean():.5f} "
                f"| {worst:.4f} | {found.same:.1%} | {found.perplexity:.4g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
