"""An engine from parts, with zero set-up: no model file, no plugin.

The mock runner "generates" a hash of everything before it, so the words mean nothing, but scheduling,
sampling, caching and streaming are the real thing. Write your own runner with these two classes as a start.

    python examples/from_components.py
"""

from nanovllm import LLM, SamplingParams
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer


def main() -> None:
    runner = MockRunner(block_size=2)
    with LLM.from_components(runner, SimpleBPETokenizer(), max_num_seqs=2) as llm:
        prompts = ["hello world", "how are you", "what is this"]
        params = SamplingParams(temperature=0, max_tokens=12)
        for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
            print(f"{prompt!r} -> {output.text!r} ({output.finish})")
        [again] = llm.generate(prompts[0], params)
        print(f"asked again, {again.stats.num_cached_tokens} prompt tokens came from the prefix cache")
        print(f"{llm.stats().num_steps} steps, {llm.stats().num_decode_tokens} tokens decoded")


if __name__ == "__main__":
    main()
