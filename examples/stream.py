"""Print an answer while it is being written.

python examples/stream.py "Tell me a story."
"""

import sys

from nanovllm import LLM, Request, SamplingParams


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else "Tell me a story."
    request = Request(
        prompt=[{"role": "user", "content": question}],
        params=SamplingParams(temperature=0.7, seed=1, max_tokens=200),
    )
    with LLM("demo") as llm:
        for delta in llm.stream(request):
            print(delta.text, end="", flush=True)
            if delta.output is not None:
                stats = delta.output.stats
                print(f"\n[{stats.num_output_tokens} tokens, the first after {1000 * (stats.ttft or 0):.0f} ms]")


if __name__ == "__main__":
    main()
