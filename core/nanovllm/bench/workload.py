"""Workloads: prompts as token ids and how many tokens each must give, read from a file or drawn from a seed.

A file is JSON:

    {"requests": [{"prompt": [17, 4, ...], "out": 72}, ...], "p512": [...], "p32": [...]}

`p512` and `p32` (which need not have these lengths) are the prompts of the prefill and the decode figure;
without one, that figure is not taken. This file knows no engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from ..errors import ConfigError, RequestError
from ..request import MAX_TOKENS, show

MAX_FILE_BYTES = 256 * 2**20
DEFAULT_VOCAB = 10_000  # ids to draw from where the model does not say how many it has
PREFILL_LEN = 512  # tokens of a drawn prefill prompt, if the model takes as many
DECODE_LEN = 32
DECODE_TOKENS = 64  # tokens that the decode figure is taken over


class Job(NamedTuple):
    """One prompt, and exactly how many tokens to generate."""

    prompt: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    name: str
    jobs: tuple[Job, ...]  # all sent at once
    prefill: tuple[int, ...] | None  # the long prompt of the prefill figure
    decode: tuple[int, ...] | None  # the short prompt of the decode figure

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(job.prompt) for job in self.jobs)

    @property
    def num_output_tokens(self) -> int:
        return sum(job.num_tokens for job in self.jobs)

    def check(self, vocab_size: int | None, max_len: int) -> None:
        """Raises RequestError, which names the prompt and the numbers, if a model of this size cannot run it."""
        asked = [(f"request {i}", job) for i, job in enumerate(self.jobs)]
        if self.prefill is not None:
            asked.append(("the prefill prompt", Job(self.prefill, 1)))
        if self.decode is not None:
            asked.append(("the decode prompt", Job(self.decode, 1 + DECODE_TOKENS)))
        for name, job in asked:
            if len(job.prompt) + job.num_tokens > max_len:
                raise RequestError(
                    f"{name} of workload {self.name}: {len(job.prompt)} prompt tokens and {job.num_tokens} new ones "
                    f"are more than the {max_len} that one sequence can hold",
                    hint="choose shorter lengths, or raise scheduler.max_model_len or cache.memory",
                )
            if vocab_size is not None and max(job.prompt) >= vocab_size:
                raise RequestError(
                    f"{name} of workload {self.name} holds the token id {max(job.prompt)}, but the model's "
                    f"vocabulary has {vocab_size} entries"
                )

    def summary(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "name": self.name,
            "requests": len(self.jobs),
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": self.num_output_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """How to draw a workload, once the model's vocabulary and length are known."""

    num_requests: int = 32
    input_len: tuple[int, int] = (20, 215)  # tokens, both ends included
    output_len: tuple[int, int] = (24, 107)
    seed: int = 0
    num_ids: int | None = None  # ids are drawn from [0, num_ids); None = the model's vocabulary
    name: str = "drawn"

    def workload(self, vocab_size: int | None, max_len: int) -> Workload:
        """The same arguments give the same workload on every machine.

        The order of draws is that of nano-vllm's bench.py: per request the prompt's length and then its ids;
        after all prompts, the output lengths.
        """
        draw, last = Random(self.seed), (self.num_ids or vocab_size or DEFAULT_VOCAB) - 1

        def prompt(length: int) -> tuple[int, ...]:
            return tuple(draw.randint(0, last) for _ in range(length))

        prompts = [prompt(draw.randint(*self.input_len)) for _ in range(self.num_requests)]
        jobs = tuple(Job(ids, draw.randint(*self.output_len)) for ids in prompts)
        return Workload(
            name=self.name,
            jobs=jobs,
            prefill=prompt(min(PREFILL_LEN, max_len - 1)) if max_len > 1 else None,
            decode=prompt(min(DECODE_LEN, max_len - DECODE_TOKENS - 1)) if max_len > DECODE_TOKENS + 1 else None,
        )


# bench.py of GeeeekExplorer/nano-vllm: seed(0), 256 sequences, randint(100, 1024) tokens in and out, ids of
# randint(0, 10000). 142,827 prompt tokens and 133,966 output tokens.
PRESETS = {
    "nano-vllm": Drawn(
        num_requests=256, input_len=(100, 1024), output_len=(100, 1024), seed=0, num_ids=10_001, name="nano-vllm"
    )
}


def read(path: Path) -> Workload:
    """A workload file. Raises ConfigError, which names the file and the place in it."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"workload {path} is larger than {MAX_FILE_BYTES} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"workload {path} cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, or nested too deeply
        raise ConfigError(f"workload {path} is not JSON: {str(e).splitlines()[0]}") from None
    rows = tree.get("requests") if isinstance(tree, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ConfigError(
            f"workload {path} has no list `requests`",
            hint='it must look like {"requests": [{"prompt": [17, 4], "out": 72}]}',
        )
    jobs = []
    for i, row in enumerate(rows):
        where = f"workload {path}: requests[{i}]"
        if not isinstance(row, dict):
            raise ConfigError(f"{where} is not an object with `prompt` and `out`")
        num_tokens = row.get("out")
        if type(num_tokens) is not int or not 1 <= num_tokens <= MAX_TOKENS:
            raise ConfigError(f"{where}.out must be a whole number from 1, not {show(num_tokens)}")
        jobs.append(Job(_ids(row.get("prompt"), f"{where}.prompt"), num_tokens))
    single = {key: _ids(tree[key], f"workload {path}: {key}") if key in tree else None for key in ("p512", "p32")}
    return Workload(name=path.name, jobs=tuple(jobs), prefill=single["p512"], decode=single["p32"])


def _ids(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} must be a list of token ids, not {show(value)}")
    if (wrong := next((v for v in value if type(v) is not int or v < 0), None)) is not None:
        raise ConfigError(f"{where} must hold token ids only, not {show(wrong)}")
    return tuple(value)
