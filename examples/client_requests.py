"""A client of `nanovllm serve` that needs nothing but requests: an answer with its metrics, then one that is streamed.

pip install 'nanovllm[numpy,server]' requests
nanovllm serve --port 8002 &
python examples/client_requests.py http://127.0.0.1:8002

Without an address it starts a server of its own, with the embedded model. A server with keys wants yours in
NANOVLLM_API_KEY.
"""

import json
import os
import subprocess
import sys

import requests

CHAT = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    "temperature": 0.7,
    "max_tokens": 200,
}


def ask(url: str) -> None:
    with requests.Session() as session:
        if key := os.environ.get("NANOVLLM_API_KEY"):
            session.headers["Authorization"] = f"Bearer {key}"

        # Non-streaming
        response = session.post(f"{url}/v1/chat", json=CHAT, timeout=60)
        response.raise_for_status()
        result = response.json()
        print(result["content"])
        print(f"Latency: {result['metrics']['total_latency']}s")
        print(f"Tokens/sec: {result['metrics']['output_tokens_per_second']}")

        # Streaming
        with session.post(f"{url}/v1/chat/stream", json=CHAT, timeout=60, stream=True) as response:
            response.raise_for_status()
            for line in response.iter_lines(decode_unicode=True):
                if not line.startswith("data: "):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    sys.exit(event["error"]["message"])
                if event.get("done"):
                    print(f"\nTime to first token: {event['metrics']['ttft']}s")
                else:
                    print(event["token"], end="", flush=True)


def main() -> None:
    if len(sys.argv) > 1:
        ask(sys.argv[1])
        return
    serve = [sys.executable, "-c", "from nanovllm.cli import main; main()", "serve", "--port=0"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            line = next(line for line in server.stdout if line.startswith("serving"))  # ... at http://127.0.0.1:40123
            ask(line.split()[-1])
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
