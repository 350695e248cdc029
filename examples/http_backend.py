"""Runner and tokenizer behind HTTP: the complete example of nano-vllm-go's integration guide.

pip install 'nanovllm[http,server]'
nanovllm runner-serve --model DIRECTORY &
python examples/http_backend.py http://localhost:8000

Without an address it starts a server of its own, with the mock runner.
"""

import subprocess
import sys

from nanovllm import LLM, SamplingParams

PROMPTS = ["Hello, world!", "Explain quantum computing."]


def ask(url: str) -> None:
    remote = {"type": "http", "url": url}
    with LLM("remote", runner=remote, tokenizer=remote, eos=2) as llm:
        params = SamplingParams(temperature=0.7, max_tokens=100)
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params, show_progress=True), strict=True):
            print(f"Prompt: {prompt}")
            print(f"Output: {output.text}\n")


def main() -> None:
    if len(sys.argv) > 1:
        ask(sys.argv[1])
        return
    serve = [sys.executable, "-c", "from nanovllm.cli import main; main()", "runner-serve", "--runner=mock", "--port=0"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ask(server.stdout.readline().split()[-1])  # serving demo (mock) at http://127.0.0.1:40123
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
