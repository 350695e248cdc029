"""What the HTTP runner costs in front of a llama-server: throughput, and time per token, against a bare client.

    LLAMA_SERVER=/path/to/llama-server python benchmarks/http_completion.py [--model FILE.gguf]

Both clients ask the same server for 32 answers at once, in turns, with the same samplers. The bare one is asyncio
with a socket for each answer: it parses every event, and does nothing else. Without --model the 0.5B shape with
random weights is first written as a q4_0 GGUF file, which needs the `gguf` package and takes minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from models import make

from gguf_files import write_gguf
from llama_servers import VARIABLE, Missing, find_llama_server, serving
from nanovllm.aio import AsyncLLM
from nanovllm.request import SamplingParams
from nanovllm_runner_http.dialects.llamacpp import SAMPLERS

MIN_THROUGHPUT = 0.95  # of the bare client's
MAX_ADDED = 1e-3  # seconds per token, at the median


def prompts(count: int, length: int, round_: int) -> list[list[int]]:
    """Different in each round, so that no prompt is found in the server's cache."""
    return [[300 + (7 * i + 31 * j + 1009 * round_) % 50_000 for j in range(length)] for i in range(count)]


async def bare(url: str, asked: list[list[int]], num_tokens: int) -> list[list[float]]:
    """The times at which each answer's tokens came."""
    host, _, port = url.removeprefix("http://").partition(":")

    async def one(ids: list[int]) -> list[float]:
        body = {"prompt": ids, "n_predict": num_tokens, "ignore_eos": True, "stream": True,
                "temperature": 0, "top_k": 1, "samplers": list(SAMPLERS)}  # fmt: skip
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /completion HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        times: list[float] = []
        while line := await reader.readline():  # sizes of chunks are lines, too; llama-server splits no event
            if line.startswith(b"data: "):
                times += [time.perf_counter()] * len(json.loads(line[6:])["tokens"])
        writer.close()
        return times

    return await asyncio.gather(*map(one, asked))


async def through_nanovllm(llm: AsyncLLM, asked: list[list[int]], num_tokens: int) -> list[list[float]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)

    async def one(ids: list[int]) -> list[float]:
        times: list[float] = []
        async for delta in llm.stream(ids, params):
            times += [time.perf_counter()] * len(delta.token_ids)
        return times

    return await asyncio.gather(*map(one, asked))


async def compare(url: str, args: argparse.Namespace) -> bool:
    rates: dict[str, list[float]] = {"bare": [], "nanovllm": []}
    gaps: dict[str, list[float]] = {"bare": [], "nanovllm": []}
    cpu: dict[str, list[float]] = {"bare": [], "nanovllm": []}
    llm = AsyncLLM(
        model="random",
        runner={"type": "http", "url": url, "dialect": "llamacpp"},
        scheduler={"max_num_seqs": args.parallel},
    )
    async with llm:
        for round_ in range(-1, args.rounds):  # the first one warms up
            for turn, name in enumerate(rates if round_ % 2 else reversed(rates)):
                asked = prompts(args.parallel, args.prompt, 2 * round_ + turn)
                start, used = time.perf_counter(), time.process_time()
                run = bare(url, asked, args.tokens) if name == "bare" else through_nanovllm(llm, asked, args.tokens)
                times = await run
                took, used = time.perf_counter() - start, time.process_time() - used
                if round_ < 0:
                    continue
                rates[name].append(sum(map(len, times)) / took)
                gaps[name].append(statistics.median((t[-1] - t[0]) / (len(t) - 1) for t in times))
                cpu[name].append(used / took)
    for name in rates:
        print(
            f"{name:9} {statistics.median(rates[name]):8.1f} tokens/s  {1000 * statistics.median(gaps[name]):7.2f} ms "
            f"per token  {100 * statistics.median(cpu[name]):5.1f} % of a core"
        )
    ratio = statistics.median(n / b for n, b in zip(rates["nanovllm"], rates["bare"], strict=True))
    added = statistics.median(n - b for n, b in zip(gaps["nanovllm"], gaps["bare"], strict=True))
    is_met = ratio >= MIN_THROUGHPUT and added <= MAX_ADDED
    print(f"throughput {ratio:.3f} of the bare client's (target: at least {MIN_THROUGHPUT})")
    print(f"added      {1000 * added:+.2f} ms per token (target: at most {1000 * MAX_ADDED:g})")
    print("ok" if is_met else "MISSED")
    return is_met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file of at least 50,300 tokens")
    parser.add_argument("--parallel", type=int, default=32, help="requests at once, and the server's slots")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if os.environ.get(VARIABLE) is None and shutil.which("llama-server") is None:
        print(f"no llama-server on PATH, and {VARIABLE} names none: nothing to measure")
        return
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        try:
            program = find_llama_server(work)
        except Missing as e:
            sys.exit(str(e))
        model = args.model or write_gguf(make("qwen2-0.5b", work / "model"), work / "model.gguf", "q4_0")
        length = args.parallel * (args.prompt + args.tokens + 8)
        command = [program, "-m", str(model), "-np", str(args.parallel), "-c", str(length), "--no-webui"]
        with serving(command, work / "server.log") as url:
            is_met = asyncio.run(compare(url, args))
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
