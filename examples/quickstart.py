"""Ask the embedded model a few questions at once; they are answered in one batch.

pip install 'nanovllm[numpy]'
python examples/quickstart.py
"""

from nanovllm import LLM, SamplingParams

COUNTRIES = ["France", "Italy", "Germany", "Japan", "Spain"]


def main() -> None:
    conversations = [[{"role": "user", "content": f"What is the capital of {name}?"}] for name in COUNTRIES]
    with LLM("demo") as llm:
        for name, output in zip(COUNTRIES, llm.chat(conversations, SamplingParams(temperature=0)), strict=True):
            print(f"{name}: {output.text}  [{len(output.token_ids)} tokens]")


if __name__ == "__main__":
    main()
