"""Time to first token of a second request that shares a long prefix with the first: at most a tenth.

    python benchmarks/prefix_cache.py                                       # mock runner, a delay per token
    python benchmarks/prefix_cache.py --model DIRECTORY --runner numpy      # a real one

Both runs are in one process; the ratio is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

from nanovllm import LLM, SamplingParams
from nanovllm.batch import FloatArray, Packed
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer

TARGET = 0.1
TAIL = 8  # tokens after the shared prefix


class DelayedRunner(MockRunner):
    """Takes 50 us for every token of a step, as a small model would."""

    def forward(self, packed: Packed) -> FloatArray:
        time.sleep(50e-6 * len(packed.input_ids))
        return super().forward(packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or name; without one, the mock runner with a delay")
    parser.add_argument("--runner", default="numpy", help="the runner for --model")
    parser.add_argument("--prefix", type=int, default=1000, help="shared tokens")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many pairs is taken")
    args = parser.parse_args()
    if args.model is None:
        llm = LLM.from_components(DelayedRunner(), SimpleBPETokenizer())
    else:
        llm = LLM(args.model, runner=args.runner)
    with llm:
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        width = llm.tokenizer.vocab_size if llm.tokenizer is not None else 100
        prefix_len = min(args.prefix, llm.info.max_model_len - TAIL - 2)
        first, second, cached = [], [], []
        for i in range(args.rounds):
            prefix = [5 + (i * 31 + 7 * j) % (width - 5) for j in range(prefix_len)]
            for times, tail in ((first, 5), (second, 6)):
                [output] = llm.generate([*prefix, *[tail] * TAIL], params, show_progress=False)
                assert output.stats.ttft is not None, "a request with a token has a time to its first"
                times.append(output.stats.ttft)
            cached.append(output.stats.num_cached_tokens)
        ratio = statistics.median(second) / statistics.median(first)
        print(f"{prefix_len} shared tokens, {statistics.median(cached):.0f} of them found in the cache")
        print(f"first  {1000 * statistics.median(first):9.2f} ms to the first token")
        print(f"second {1000 * statistics.median(second):9.2f} ms")
        print(f"ratio  {ratio:9.3f}    (target: at most {TARGET}: {'ok' if ratio <= TARGET else 'MISSED'})")


if __name__ == "__main__":
    main()
