"""Several conversations at once on one event loop; whoever is answered first is printed first.

python examples/async_chat.py
"""

import asyncio
from contextlib import aclosing

from nanovllm import AsyncLLM, SamplingParams

QUESTIONS = ["Who are you?", "What is the capital of Japan?", "What is 3 plus 4?", "Tell me a story."]


async def ask(llm: AsyncLLM, question: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=100)
    output = await llm.chat([{"role": "user", "content": question}], params)
    print(f"{question} -> {output.text}")


async def main() -> None:
    async with AsyncLLM("demo") as llm:
        await asyncio.gather(*(ask(llm, question) for question in QUESTIONS))

        # A consumer that goes away takes its request with it; blocks and slot are free for the others.
        story = ""
        prompt = [{"role": "user", "content": "Tell me a story."}]
        async with aclosing(llm.stream(prompt, SamplingParams(temperature=0, max_tokens=100))) as deltas:
            async for delta in deltas:
                story += delta.text
                if len(story) > 40:
                    break
        print(f"enough of this: {story}...")


if __name__ == "__main__":
    asyncio.run(main())
