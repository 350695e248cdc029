"""`nanovllm logits --prompt TEXT`: the raw logits after a prompt, and where an expected token stands among them.

One sequence, straight through `LogitsRunner.forward`: no engine, no sampler. For comparing a model with another
implementation of it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, RequestError, RunnerError
from .options import EngineCommand, engine_options
from .terminal import echo

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ..components import Components
    from ..config import Loaded
    from ..tokenizer import Tokenizer


@click.command(cls=EngineCommand)
@engine_options
@click.option("--prompt", required=True, help="The text that comes before.")
@click.option("--position", type=int, default=-1, show_default=True, help="Token of the prompt; -1 is the last.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many tokens to show.")
@click.option("--expect-id", type=click.IntRange(min=0), help="Id that should be the most likely.")
@click.option("--expect-text", metavar="TEXT", help="Token that should be, such as ' Berlin'.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def logits(
    ctx: click.Context, loaded: Loaded, prompt: str, position: int, top: int,
    expect_id: int | None, expect_text: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Show the likeliest next tokens.

    With --expect-id or --expect-text, the exit status is 1 unless that token is the most likely one.
    """
    from ..components import build

    if expect_id is not None and expect_text is not None:
        raise click.UsageError("give --expect-id or --expect-text, not both")
    parts = build(loaded)
    try:
        document = _measure(parts, prompt, position, top, expect_id, expect_text)
    finally:
        parts.runner.close()
    if as_json:
        echo(json.dumps(document, indent=2))
    else:
        _print(document)
    expected = document["expected"]
    if expected is not None and expected["rank"] != 1:
        ctx.exit(1)


def _measure(
    parts: Components, prompt: str, position: int, top: int, expect_id: int | None, expect_text: str | None
) -> dict[str, Any]:
    import numpy as np

    tokenizer = parts.tokenizer
    if tokenizer is None:
        raise ConfigError("logits needs a tokenizer", hint="set tokenizer.type and tokenizer.path")
    ids = tokenizer.encode(prompt)
    if not -len(ids) <= position < len(ids):
        raise RequestError(f"the prompt has {len(ids)} tokens, so it has no position {position}")
    at = range(len(ids))[position]
    row = row_after(parts, ids[: at + 1])  # (vocab,)
    order = np.argsort(-row, kind="stable")  # ties to the lowest id, as in every sampler
    ranks = np.empty(len(row), np.int64)
    ranks[order] = np.arange(1, len(row) + 1)
    log_sum = float(row.max()) + float(np.log(np.exp(row - row.max()).sum()))

    def told(token: int) -> dict[str, Any]:
        return {
            "id": token,
            "text": tokenizer.token_bytes(token).decode("utf-8", "replace"),
            "rank": int(ranks[token]),
            "logit": float(row[token]),
            "logprob": float(row[token]) - log_sum,
        }

    if expect_text is not None:
        expect_id = _id_of(tokenizer, expect_text, order.tolist())
    elif expect_id is not None and expect_id >= len(row):
        raise RequestError(f"there is no token {expect_id}: the model's vocabulary has {len(row)} entries")
    return {
        "prompt_ids": ids,
        "position": at,
        "token": tokenizer.token_bytes(ids[at]).decode("utf-8", "replace"),
        "vocab_size": len(row),
        "min": float(row.min()),
        "mean": float(row.mean()),
        "max": float(row.max()),
        "top": [told(token) for token in order[:top].tolist()],
        "expected": None if expect_id is None else told(expect_id),
    }


def row_after(parts: Components, ids: Sequence[int]) -> NDArray[np.float64]:
    """The logits (vocab,) float64 that follow `ids`, computed in as many steps as the configuration's limit needs.

    Raises ConfigError for a runner without logits, RequestError for too many ids, RunnerError for NaN.
    """
    import numpy as np

    from ..batch import Batch, Lanes, Paged, Sampling, ScheduledSeq
    from ..request import SamplingParams
    from ..runner import LogitsRunner

    runner, info = parts.runner, parts.runner.info
    if not isinstance(runner, LogitsRunner):
        raise ConfigError(
            f"runner '{parts.loaded.config.runner.type}' returns tokens, not logits", hint="choose a local runner"
        )
    room = info.max_model_len
    if isinstance(info.kv, Paged):
        room = min(room, info.kv.block_size * info.kv.num_blocks)
    elif isinstance(info.kv, Lanes):
        room = min(room, info.kv.max_len)
    if len(ids) > room:
        raise RequestError(f"the prompt has {len(ids)} tokens, and the model takes {room}", hint="shorten the prompt")

    context = np.array(ids, np.int32)
    block_size = info.kv.block_size if isinstance(info.kv, Paged) else 0
    blocks = np.arange(-(-len(ids) // block_size) if block_size else 0, dtype=np.int32)
    sampling = Sampling(SamplingParams(), (), frozenset(), 0, 0, True)
    step = parts.loaded.config.scheduler.max_num_batched_tokens if info.can_chunk else len(ids)
    for start in range(0, len(ids), step):
        stop = min(start + step, len(ids))
        seq = ScheduledSeq(0, 0, context, len(ids), start, stop, int(stop == len(ids)), blocks, sampling, None)
        rows = runner.forward(Batch((seq,), blocks[None] if block_size else None, block_size).packed)
    runner.release(0, 0)
    row = np.array(rows[0].tolist(), np.float64)  # of whatever array type, on whatever device
    if not np.isfinite(row).all():
        raise RunnerError(f"{int((~np.isfinite(row)).sum())} of the {len(row)} logits are not finite numbers")
    return row


def _id_of(tokenizer: Tokenizer, text: str, order: Sequence[int]) -> int:
    """The token that spells `text`; the likeliest if several do."""
    wanted = text.encode("utf-8", "surrogatepass")
    found = next((i for i in order if tokenizer.token_bytes(i) == wanted), None)
    if found is None or not wanted:
        pieces = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.encode(text)]
        raise RequestError(
            f"{text!r} is not one token", hint=f"it is {len(pieces)}: {', '.join(map(repr, pieces))}; expect the first"
        )
    return found


def _print(document: dict[str, Any]) -> None:
    echo(f"After token {document['position']} ({document['token']!r}) of {len(document['prompt_ids'])}:")
    echo(
        f"{document['vocab_size']} logits, mean {document['mean']:.4f}, min {document['min']:.4f}, "
        f"max {document['max']:.4f}\n"
    )
    echo(f"{'rank':>6} {'id':>7} {'logit':>10} {'logprob':>9}  token")
    for row in document["top"]:
        echo(_line(row))
    if (expected := document["expected"]) is not None:
        echo("\nExpected:" if expected["rank"] == 1 else "\nExpected, but not the most likely:")
        echo(_line(expected))


def _line(row: dict[str, Any]) -> str:
    return f"{row['rank']:>6} {row['id']:>7} {row['logit']:>10.4f} {row['logprob']:>9.4f}  {row['text']!r}"
