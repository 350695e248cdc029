"""What `nanovllm serve` adds: milliseconds per streamed token, its share of the offline engine's speed, and what
10,000 requests leave behind of which half are cut off at random points.

    python benchmarks/serve.py [latency | share | cut] [--requests 10000]

The server and its engine are this process, the clients are another. `latency`: the mock runner takes 10 ms a step, and
the time from a step's end to the arrival of its tokens is taken for each token, by the machine's one monotonic clock.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from models import make

from nanovllm import LLM, SamplingParams
from nanovllm.aio import AsyncLLM
from nanovllm.batch import Batch, SeqOutput
from nanovllm.builtin.mock import MockRunner, Script

STEP = 0.010  # seconds
TARGETS = {64: 6.0, 4: 1.0}  # streams -> milliseconds per token
MIN_RATE = 5000  # streamed tokens a second, of 64 streams
MIN_SHARE = 0.9
PARTS = ["latency", "share", "cut"]
QUESTION = "What is the capital of France?"
MAX_P99 = 2.0  # of those that are not cut, over those where nobody is


class Letters:
    """A tokenizer whose every token is one character, so that a text says how many tokens it is."""

    eos_ids = ()
    vocab_size = 94

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return [ord(c) - 33 for c in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(33 + i) for i in ids)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes((33 + token_id,))

    def chat(self, messages: Any) -> list[int]:
        raise NotImplementedError


class Clock(MockRunner):
    """Notes when each token was drawn."""

    def __init__(self, step: float, num_seqs: int) -> None:
        super().__init__(Letters.vocab_size, script=Script(delay=step), num_blocks=16384, max_num_seqs=num_seqs)
        self.drawn: dict[tuple[int, int], float] = {}  # (stream, tokens so far) -> seconds

    def execute(self, batch: Batch) -> list[SeqOutput]:
        outputs = super().execute(batch)
        now = time.perf_counter()
        for seq in batch.seqs:
            if seq.samples:
                stream = int(seq.context[0]) + Letters.vocab_size * int(seq.context[1])
                self.drawn[stream, len(seq.context) - seq.num_prompt + 1] = now
        return outputs


# --------------------------------------------------------------------------------- the clients' process


async def stream(port: int, prompt: Any, max_tokens: int, cut_after: int | None = None) -> list[tuple[float, int]]:
    """(arrival, tokens so far) of each event; ends after `cut_after` bytes, if they are given."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    raw = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head % len(raw) + b"\r\nConnection: close\r\n\r\n" + raw)
    events, num_tokens, num_bytes, held = [], 0, 0, b""
    try:
        while data := await reader.read(65536):
            now = time.perf_counter()
            num_bytes += len(data)
            if cut_after is not None and num_bytes >= cut_after:
                return events
            *whole, held = (held + data).split(b"\n\n")
            for part in whole:
                payload = part.partition(b"data: ")[2]
                if payload == b"[DONE]":
                    return events
                num_tokens += len(json.loads(payload)["choices"][0]["text"])
                events.append((now, num_tokens))
        raise SystemExit(f"a stream ended early: {held!r}")
    finally:
        writer.close()


async def streams(port: int, num_streams: int, max_tokens: int, prompt: str | None) -> Any:
    """All at once."""
    prompts = [
        [i % Letters.vocab_size, i // Letters.vocab_size] if prompt is None else prompt for i in range(num_streams)
    ]
    started = time.perf_counter()
    events = await asyncio.gather(*[stream(port, p, max_tokens) for p in prompts])
    return {"events": events, "seconds": time.perf_counter() - started}


async def many(port: int, num_requests: int, max_tokens: int, is_cut: bool) -> Any:
    """64 at a time; the seconds that those took which were not cut."""
    dice, took = random.Random(0), []
    todo = iter(range(num_requests))

    async def work() -> None:
        for i in todo:
            cut_after = dice.randrange(6000) if is_cut and i % 2 else None
            started = time.perf_counter()
            await stream(port, [i % 90, i // 90 % 90], max_tokens, cut_after)
            if not i % 2:
                took.append(time.perf_counter() - started)

    await asyncio.gather(*[work() for _ in range(64)])
    return took


def in_another_process(call: str, *arguments: Any) -> Any:
    command = [sys.executable, __file__, "--client", json.dumps([call, *arguments])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


# ------------------------------------------------------------------------------------ the server's


@contextmanager
def serving(llm: AsyncLLM) -> Iterator[int]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from serve_support import serving as serve

    with serve(llm=llm) as server:
        yield server.port


def latency(num_streams: int, num_tokens: int = 300) -> None:
    runner = Clock(STEP, num_streams)
    with serving(AsyncLLM.from_components(runner, Letters(), max_num_seqs=num_streams)) as port:
        before = time.process_time()
        answer = in_another_process("streams", port, num_streams, num_tokens, None)
        cpu = time.process_time() - before
    added = [
        1000 * (arrival - runner.drawn[i, so_far])
        for i, events in enumerate(answer["events"])
        for arrival, so_far in events
    ]
    total = num_streams * num_tokens
    rate, median, target = total / answer["seconds"], statistics.median(added), TARGETS[num_streams]
    print(f"{num_streams} streams of {num_tokens} tokens, a step of {1000 * STEP:g} ms")
    print(f"  added per token    {median:7.2f} ms   target {target:g}: {said(median <= target)}")
    print(f"  95 % within        {statistics.quantiles(added, n=20)[-1]:7.2f} ms")
    print(f"  streamed           {rate:7.0f} tokens/s   {len(added)} events for {total} tokens")
    if num_streams == max(TARGETS):
        print(f"  at least           {MIN_RATE:7.0f} tokens/s   {said(rate >= MIN_RATE)}")
    print(f"  processor          {1e6 * cpu / total:7.0f} us per token, the engine's part in it")


def share(name: str, model: str, num_streams: int, num_tokens: int) -> None:
    """The same greedy answers by the offline engine and through the server, three times each, in turns."""
    settings: dict[str, Any] = {"runner": "numpy", "max_num_seqs": num_streams}
    rates: dict[str, list[float]] = {"offline": [], "served": []}
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    with LLM(model, **settings) as llm, serving(AsyncLLM(model, **settings)) as port:
        for _ in range(3):
            started = time.perf_counter()
            llm.generate([QUESTION] * num_streams, params)
            rates["offline"].append(num_streams * num_tokens / (time.perf_counter() - started))
            answer = in_another_process("streams", port, num_streams, num_tokens, QUESTION)
            rates["served"].append(num_streams * num_tokens / answer["seconds"])
    offline, served = (statistics.median(values) for values in rates.values())
    print(f"{num_streams} streams of {num_tokens} tokens, {name} on numpy")
    print(f"  offline            {offline:7.1f} tokens/s")
    is_fine = said(served >= MIN_SHARE * offline)
    print(f"  served             {served:7.1f} tokens/s   {served / offline:.2f} of it, target {MIN_SHARE}: {is_fine}")


def cut(num_requests: int) -> None:
    llm = AsyncLLM.from_components(MockRunner(script=Script(delay=0.001)), Letters(), max_num_seqs=64)
    with serving(llm) as port:
        in_another_process("many", port, 500, 24, True)  # what is allocated once is
        calm = in_another_process("many", port, num_requests // 4, 24, False)
        disturbed = in_another_process("many", port, num_requests // 2, 24, True)
        before = held()
        disturbed += in_another_process("many", port, num_requests // 2, 24, True)
        deadline = time.monotonic() + 10
        while (llm.engine.has_work or llm._mail) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # for connections to close
        after = held()
        blocks, inboxes = llm.engine.kv_blocks(), len(llm._mail)
        assert blocks is not None
    was, p99 = (1000 * statistics.quantiles(took, n=100)[-1] for took in (calm, disturbed))
    print(f"{num_requests} requests of 24 tokens, 64 at a time, every other one cut at a random byte")
    print(
        f"  p99 of the others  {p99:7.1f} ms   {p99 / was:.2f} of {was:.1f} undisturbed: {said(p99 <= MAX_P99 * was)}"
    )
    print(f"  left behind        {blocks.used} blocks, {inboxes} inboxes: {said(not blocks.used and not inboxes)}")
    print("  in the second half:")
    for name in before:
        print(f"    {name:16} {before[name]} -> {after[name]}")


def held() -> dict[str, int]:
    gc.collect()
    # By type(): to isinstance(), lazy modules would say what they are, and load for it.
    status = Path("/proc/self/status").read_text()
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": int(status.partition("Threads:")[2].split()[0]),
        "tasks": sum(issubclass(type(o), asyncio.Task) for o in gc.get_objects()),
        "resident KiB": int(status.partition("VmRSS:")[2].split()[0]),
    }


def said(is_fine: bool) -> str:
    return "ok" if is_fine else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="all of them if none is named")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        call, *arguments = json.loads(args.client)
        print(json.dumps(asyncio.run({"streams": streams, "many": many}[call](*arguments))))
        return
    for part in PARTS if args.part is None else [args.part]:
        if part == "latency":
            for num_streams in TARGETS:
                latency(num_streams)
        elif part == "share":
            share("demo", "demo", 8, 200)  # 2 million parameters: a step takes about as long as 8 writes to sockets
            with TemporaryDirectory() as directory:
                share("gpt2's shape", str(make("gpt2", Path(directory))), 8, 100)
        else:
            cut(args.requests)


if __name__ == "__main__":
    main()
