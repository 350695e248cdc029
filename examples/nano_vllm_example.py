"""A program written for nano-vllm: the same calls, only the model's path is another.

Options of nano-vllm that mean nothing here are accepted where their value changes nothing (`enforce_eager`,
`tensor_parallel_size=1`).

    python examples/nano_vllm_example.py [MODEL_DIRECTORY]
"""

import sys

from nanovllm import LLM, SamplingParams


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else "demo"
    llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)
    sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
    prompts = ["introduce yourself", "list all prime numbers within 100"]
    outputs = llm.generate(prompts, sampling_params)
    for prompt, output in zip(prompts, outputs, strict=True):
        print()
        print(f"Prompt: {prompt!r}")
        print(f"Completion: {output['text']!r}")


if __name__ == "__main__":
    main()
