"""`nanovllm compare`: a fault planted in each stage is named, with its size; and what makes comparing impossible."""

from __future__ import annotations

import gc
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import serve_support
import server_support
from http_support import Asked, ScriptedServer, Wire
from nanovllm.batch import TokenLogprob
from nanovllm.builtin.mock import chain_logits, chain_states, expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.cli import cli
from nanovllm.compare import scores
from nanovllm.compare.comparison import compare_answers
from nanovllm.compare.prompts import BUILT_IN, Prompt
from nanovllm.compare.stages import STAGES
from nanovllm.config import load
from nanovllm.request import SamplingParams
from site_of_fakes import fake_site

TOKENIZER = SimpleBPETokenizer()
PROMPT = "what is the word"
IDS = TOKENIZER.encode(PROMPT)

Compare = Callable[..., Result]

PLANTED = {
    "nanovllm.tokenizers": (
        "other_template", "other_controls", "newline_behind", "no_template", "letters", "other_bytes", "strips_spaces",
        "other_end", "no_end", "with_bos", "other_types", "raises",
    ),
    "nanovllm.runners": (
        "nudged", "opaque", "draws_itself", "described", "coarse", "swapped", "spaceless", "shifted", "impossible",
        "extreme",
    ),
}  # fmt: skip
# Each is another provider of `numpy`: a sampler's name is the kind of logits that it takes.
PLANTED_SAMPLERS = ("last_of_ties", "fails", "ignores_top_k", "ignores_temperature", "ignores_min_tokens")


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compare]:
    """compare({...}, {...}, "--json"): configurations over `runner: mock`, as files a.yaml, b.yaml and so on."""
    for site in fake_site(tmp_path / "site", monkeypatch):
        lines = {group: [f"{name} = planted_faults:{name}" for name in names] for group, names in PLANTED.items()}
        site("planted", {group: "\n".join(some) for group, some in lines.items()})
        for name in PLANTED_SAMPLERS:
            site(name.replace("_", "-"), {"nanovllm.samplers": f"numpy = planted_faults:{name}"})
        monkeypatch.chdir(tmp_path)
        # Read once: most of the time of a comparison this small.
        monkeypatch.setattr(importlib.metadata, "entry_points", importlib.metadata.entry_points().select)

        def run(*arguments: Any) -> Result:
            files = []
            for letter, config in zip("abcdef", (a for a in arguments if isinstance(a, dict)), strict=False):
                Path(f"{letter}.yaml").write_text(yaml.safe_dump({"runner": "mock", "tokenizer": "simple", **config}))
                files.append(f"{letter}.yaml")
            words = [a for a in arguments if isinstance(a, str)]
            return CliRunner(env={"MODEL_PATH": None, "TOKENIZER_PATH": None}).invoke(cli, ["compare", *files, *words])

        gc.freeze()  # else most of the time goes into looking for garbage in all that the tests have imported
        yield run
        gc.unfreeze()


def compared(result: Result) -> dict[str, Any]:
    """The one comparison of a JSON document."""
    (comparison,) = json.loads(result.stdout)["comparisons"]
    return comparison


def the_difference(result: Result) -> dict[str, Any]:
    assert result.exit_code == 1, result.output
    (difference,) = compared(result)["differences"]
    assert difference["stage"] in STAGES
    return difference


def verdict_shown(result: Result) -> str:
    """Of b.yaml, in the table."""
    return next(line for line in result.stdout.splitlines() if line.startswith("b.yaml ")).split()[4]


ONE = ("--prompt", PROMPT, "--json")
CHAT = ("--chat", *ONE)


def chain(ids: list[int]) -> np.ndarray:
    """(vocab,) the mock runner's logits after `ids`."""
    return chain_logits(chain_states(ids)[-1:], TOKENIZER.vocab_size)[0]


# --------------------------------------------------------------------------------------- no fault


def test_a_configuration_equals_itself(compare: Compare) -> None:
    for arguments in ((), ("--temperature", "0.8", "--seed", "3", "--top-p", "0.9")):
        result = compare({}, {}, "--json", *arguments)
        assert result.exit_code == 0, result.output
        comparison = compared(result)
        assert comparison["differences"] == []
        assert (comparison["prompts"], comparison["largest_difference"]) == (len(BUILT_IN), 0)
        answers = json.loads(result.stdout)["configurations"]["a.yaml"]["answers"]
        assert comparison["equal_tokens"] == sum(len(a["token_ids"]) for a in answers) > 0


def test_how_it_is_computed_makes_no_difference(compare: Compare) -> None:
    small = {"cache": {"block_size": 2, "num_blocks": 70}, "scheduler": {"max_num_seqs": 2}}
    lanes = {"runner": {"type": "mock", "layout": "lanes"}, "cache": {"prefix_caching": False}}
    result = compare({}, small, lanes, "--temperature", "1", "--json")
    assert result.exit_code == 0, result.output
    assert [c["largest_difference"] for c in json.loads(result.stdout)["comparisons"]] == [0, 0]


# ------------------------------------------------------------------------------ one fault per stage


def test_template(compare: Compare) -> None:
    found = the_difference(compare({}, {"tokenizer": "other_template"}, *CHAT))
    assert (found["stage"], found["position"]) == ("template", 0)
    assert f"a.yaml has {TOKENIZER.encode('U')[0]} 'U'" in found["sentence"]
    assert f"b.yaml has {TOKENIZER.encode('use')[0]} 'use'" in found["sentence"]


def test_template_with_other_control_tokens(compare: Compare) -> None:
    found = the_difference(compare({}, {"tokenizer": "other_controls"}, *CHAT))
    assert (found["stage"], found["position"]) == ("template", 0)
    assert found["sentence"].endswith("(both spell the same text, so control tokens differ)")


def test_what_a_template_writes_may_be_merged_otherwise(compare: Compare) -> None:
    """The text of the message becomes the same ids; "Assistant" does not, although both templates write it."""
    found = the_difference(compare({}, {"tokenizer": "letters"}, "--chat", "--prompt", "zz", "--json"))
    assert found["stage"] == "tokenizer"
    assert found["sentence"].startswith("the conversation becomes other ids from token ")


def test_one_without_a_template(compare: Compare) -> None:
    found = the_difference(compare({}, {"tokenizer": "no_template"}, *CHAT))
    assert found["stage"] == "template"
    assert found["sentence"] == "b.yaml refuses it: the model's directory has no chat template"


def test_conversations_that_nobody_takes(compare: Compare) -> None:
    """Built-in ones are left out; one that was asked for is an error."""
    both = {"tokenizer": "no_template"}
    result = compare(both, both, "--json")
    assert result.exit_code == 0
    assert compared(result)["prompts"] == sum(not prompt.is_chat for prompt in BUILT_IN)
    assert the_difference(compare(both, both, *CHAT))["stage"] == "error"


@pytest.mark.parametrize("how", [ONE, CHAT])
def test_tokenizer_that_merges_otherwise(compare: Compare, how: tuple[str, ...]) -> None:
    """Also in a conversation, which comes out otherwise because of its text."""
    found = the_difference(compare({}, {"tokenizer": "letters"}, *how))
    assert (found["stage"], found["position"]) == ("tokenizer", 0)
    assert f"a.yaml has {IDS[0]} 'what'" in found["sentence"]
    assert "b.yaml has 74 'w', 59 'h', 52 'a'" in found["sentence"]
    assert "both spell the same text" in found["sentence"]


def test_tokenizer_with_other_bytes(compare: Compare) -> None:
    found = the_difference(compare({}, {"tokenizer": "other_bytes"}, *ONE))
    space = TOKENIZER.encode(" ")[0]
    assert (found["stage"], found["position"]) == ("tokenizer", IDS.index(space))
    assert found["sentence"].endswith(f"a.yaml has {space} ' ', b.yaml {space} '_'")


def test_other_bytes_in_the_answer_alone(compare: Compare) -> None:
    """Nothing in the prompt is concerned."""
    tokens = expected(TOKENIZER.encode("x"), 400)
    at = tokens.index(TOKENIZER.encode(" ")[0])
    found = the_difference(
        compare({}, {"tokenizer": "other_bytes"}, "--prompt", "x", "--max-tokens", "400", "--ignore-eos", "--json")
    )
    assert (found["stage"], found["position"]) == ("tokenizer", at)


def test_logits(compare: Compare) -> None:
    """The runner-up is lifted above the best by a known amount."""
    length = len(IDS) + 3
    tokens = expected(IDS, 4)
    row = chain(IDS + tokens[:3]).astype(float)
    best, second = np.argsort(-row)[:2].tolist()
    amount = float(row[best] - row[second] + 0.5)
    nudge = {"type": "nudged", "token": second, "amount": amount, "from_length": length}
    found = the_difference(compare({}, {"runner": nudge}, *ONE))
    assert (found["stage"], found["position"], found["is_tie"]) == ("logits", 3, False)
    logits = found["logits"]
    assert (logits["unit"], logits["tokens"], logits["largest_at"]) == ("logits", [best, second], second)
    assert logits["largest_difference"] == pytest.approx(amount, rel=1e-5)
    assert logits["reference"] == pytest.approx([row[best], row[second]], rel=1e-5)
    assert logits["other"] == pytest.approx([row[best], row[second] + amount], rel=1e-5)
    assert logits["margins"] == pytest.approx([row[best] - row[second], 0.5], rel=1e-4)
    assert f"differ by up to {amount:.2g}" in found["sentence"]


def test_logits_within_the_tolerance_are_a_tie(compare: Compare) -> None:
    row = chain(IDS)
    second = int(np.argsort(-row)[1])
    nudged = {"runner": {"type": "nudged", "token": second, "amount": float(row.max() - row[second]) + 0.01}}
    wide = (*ONE, "--tolerance", "3")
    result = compare({}, nudged, *wide)
    assert result.exit_code == 0
    (tie,) = compared(result)["differences"]
    assert (tie["stage"], tie["is_tie"], tie["position"]) == ("logits", True, 0)
    assert the_difference(compare({}, nudged, *wide, "--strict"))["is_tie"]
    assert ": logits, a tie: " in compare({}, nudged, "--prompt", PROMPT, "--tolerance", "3").stdout
    for words, stage in (((), None), (("--strict",), "logits")):
        assert compared(compare({}, nudged, *wide, *words))["stage"] == stage
        assert verdict_shown(compare({}, nudged, *wide[:2], *wide[3:], *words)) == (stage or "equal")


def test_logits_that_are_no_numbers(compare: Compare) -> None:
    found = the_difference(compare({}, {"runner": {"type": "mock", "script": {"nan_steps": [3]}}}, *ONE))
    assert (found["stage"], found["position"]) == ("logits", 2)
    assert "NaN" in found["sentence"]


def test_sampler_with_another_rule_for_ties(compare: Compare) -> None:
    row = np.floor(chain(IDS) / 4)
    first, last = (np.flatnonzero(row == row.max())[[0, -1]]).tolist()
    assert first != last
    coarse = {"runner": "coarse"}
    found = the_difference(compare(coarse, {**coarse, "sampler": "numpy@last-of-ties"}, *ONE))
    assert (found["stage"], found["position"]) == ("sampler", 0)
    assert found["logits"]["tokens"] == [first, last]
    assert found["logits"]["largest_difference"] == 0
    assert f"but the logits of b.yaml call for {first};" in found["sentence"]
    # The reference may be the one at fault.
    found = the_difference(compare({**coarse, "sampler": "numpy@last-of-ties"}, coarse, *ONE))
    assert (found["stage"], f"but the logits of a.yaml call for {first};" in found["sentence"]) == ("sampler", True)


def test_sampler_that_ignores_top_k(compare: Compare) -> None:
    seeded = ("--temperature", "2", "--top-k", "2", "--seed", "5")
    result = compare({}, {"sampler": "numpy@ignores-top-k"}, *ONE, *seeded)
    found = the_difference(result)
    assert found["stage"] == "sampler"
    assert "the logits of b.yaml call for" in found["sentence"]
    best = np.argsort(-chain(IDS + _answer(result, "a.yaml")[: found["position"]]))[:2].tolist()
    assert found["logits"]["tokens"][0] in best
    assert found["logits"]["tokens"][1] not in best


def test_a_sampler_at_fault_is_no_tie(compare: Compare) -> None:
    """Where the logits of both call for different tokens within the tolerance, and one sampler drew a third one."""
    row = chain(IDS)
    second = int(np.argsort(-row)[1])
    runner = {"type": "nudged", "token": second, "amount": float(row.max() - row[second]) + 0.01}
    both = {"runner": runner, "sampler": "numpy@ignores-top-k"}
    seeded = (*ONE, "--temperature", "50", "--top-k", "1", "--seed", "1")
    within = the_difference(compare({}, both, *seeded, "--tolerance", "30"))
    beyond = the_difference(compare({}, both, *seeded))
    assert (within["stage"], within["is_tie"], beyond["stage"]) == ("sampler", False, "logits")
    for found in (within, beyond):
        assert (found["position"], found["logits"]["tokens"][0]) == (0, row.argmax())
        assert f"but the logits of b.yaml call for {second};" in found["sentence"]


@pytest.mark.parametrize(
    ("fault", "words", "stage"),
    [
        ({"tokenizer": "newline_behind"}, CHAT, "template"),
        ({"tokenizer": "strips_spaces"}, ONE, "tokenizer"),
        ({"tokenizer": {"type": "raises", "method": "encode"}}, ONE, "tokenizer"),
        ({"tokenizer": {"type": "raises", "method": "encode"}}, CHAT, "tokenizer"),
        ({"tokenizer": {"type": "raises", "method": "chat"}}, CHAT, "template"),
        ({"runner": "swapped"}, ("--prompt", "x", "--json"), "logits"),
        ({"runner": "impossible"}, ONE, "logits"),
        ({"runner": "extreme"}, (*ONE, "--temperature", "1"), "logits"),
        ({"sampler": "numpy@ignores-temperature"}, (*ONE, "--temperature", "1"), "sampler"),
        ({"sampler": "numpy@fails"}, ONE, "sampler"),
        ({"runner": "draws_itself"}, (*ONE, "--repetition-penalty", "9"), "sampler"),
    ],
)
def test_other_faults(compare: Compare, fault: dict[str, Any], words: tuple[str, ...], stage: str) -> None:
    found = the_difference(compare({}, fault, *words))
    assert found["stage"] == stage
    assert "the logits of a.yaml call for" not in found["sentence"]  # it drew what they call for


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"runner": "shifted"}, ()),
        ({"runner": "described"}, ()),
        ({"tokenizer": "other_types"}, ()),
        ({}, ("--stop", "a")),
    ],
)
def test_what_is_no_fault(compare: Compare, what: dict[str, Any], words: tuple[str, ...]) -> None:
    """A constant in all logits, numbers of another type, an answer that ends at a text."""
    result = compare({}, what, "--json", *words)
    assert (result.exit_code, compared(result)["differences"]) == (0, []), result.output


def test_a_missing_end(compare: Compare) -> None:
    """The mock runner knows no end of text, so the tokenizer's is the only one."""
    at = next(i for i in range(500) if 2 in expected(TOKENIZER.encode(str(i)), 32))
    found = the_difference(compare({}, {"tokenizer": "no_end"}, "--prompt", str(at), "--json"))
    assert found["stage"] == "stop"
    assert "their end-of-text ids differ: [2] and []" in found["sentence"]


def test_ignored_min_tokens(compare: Compare) -> None:
    """Of which the command has no option."""
    compare()  # installs the samplers
    end = expected(IDS, 2)[1]
    runs = [
        load(environ={}, overrides={"runner": "mock", "tokenizer": "simple", "eos": [end], "sampler": sampler})
        for sampler in ("auto", "numpy@ignores-min-tokens")
    ]
    params = SamplingParams(temperature=0, max_tokens=6, seed=2**64 - 1, min_tokens=4)
    comparison = compare_answers(
        [("a", runs[0]), ("b", runs[1])], [Prompt(content=text) for text in (PROMPT, "x")], params
    )
    (verdict,) = comparison.verdicts
    assert (verdict.stage(is_strict=False), verdict.differences[0].position) == ("sampler", 1)


def test_the_verdict_is_the_first_stage(compare: Compare) -> None:
    """Whichever prompt shows it."""
    both = {"tokenizer": "newline_behind", "runner": {"type": "mock", "seed": 1}}
    result = compare({}, both, "--json")
    comparison = compared(result)
    assert comparison["differences"][0]["stage"] == "logits"
    assert comparison["stage"] == "template"
    assert verdict_shown(compare({}, both)) == "template"


def test_seeded_draws_from_other_logits_are_the_logits_fault(compare: Compare) -> None:
    nudged = {"runner": {"type": "nudged", "token": 7, "amount": 8.0}}
    found = the_difference(compare({}, nudged, *ONE, "--temperature", "1", "--seed", "2"))
    assert found["stage"] == "logits"
    assert found["logits"]["largest_difference"] == pytest.approx(8)


@pytest.mark.parametrize("how", ["eos", "length"])
def test_stop(compare: Compare, how: str) -> None:
    tokens = expected(IDS, 32)
    end = tokens[3]
    num = tokens.index(end) + 1
    given = {"eos": [end]} if how == "eos" else {"scheduler": {"max_model_len": len(IDS) + num}}
    found = the_difference(
        compare({}, given, *ONE, "--ignore-eos") if how == "length" else compare({"eos": []}, given, *ONE)
    )
    assert (found["stage"], found["position"]) == ("stop", num)
    if how == "eos":
        assert f"b.yaml ended after {num} tokens (at its end-of-text id {end})" in found["sentence"]
        assert f"their end-of-text ids differ: [] and [{end}]" in found["sentence"]
    else:
        assert f"b.yaml ended after {num} tokens (length)" in found["sentence"]


def _answer(result: Result, name: str) -> list[int]:
    answers = json.loads(result.stdout)["configurations"][name]["answers"]
    tokens: list[int] = answers[0]["token_ids"]
    return tokens


def test_a_runner_that_fails(compare: Compare) -> None:
    found = the_difference(compare({}, {"runner": {"type": "mock", "script": {"fail_steps": [3]}}}, *ONE))
    assert (found["stage"], found["position"]) == ("error", 2)
    assert "b.yaml failed: " in found["sentence"]


def test_a_prompt_that_one_refuses(compare: Compare) -> None:
    found = the_difference(compare({}, {"scheduler": {"max_model_len": 4}}, *ONE))
    assert found["stage"] == "error"
    assert f"b.yaml failed: the prompt has {len(IDS)} tokens" in found["sentence"]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 124), st.floats(-8, 8, width=32), st.text("ab cde", min_size=1, max_size=12))
def test_any_nudge_is_measured(compare: Compare, token: int, amount: float, text: str) -> None:
    """Against greedy decoding written down here: where the tokens part, and how much the logits differ until there."""
    runs = [
        load(environ={}, overrides={"runner": runner, "tokenizer": "simple", "eos": []})
        for runner in ({"type": "mock"}, {"type": "nudged", "token": token, "amount": amount})
    ]
    params = SamplingParams(temperature=0, max_tokens=6, seed=0)
    (verdict,) = compare_answers(
        [("a", runs[0]), ("b", runs[1])], [Prompt(content=text)], params, tolerance=1e-3
    ).verdicts
    context, at = TOKENIZER.encode(text), None
    differences = []
    for position in range(6):
        row = chain(context)
        other = row.copy()
        other[token] += np.float32(amount)
        differences.append(float(np.abs(other.astype(float) - row).max()))
        if row.argmax() != other.argmax():
            at = position
            break
        context.append(int(row.argmax()))
    assert verdict.largest == max(differences)
    assert verdict.num_tokens == (6 if at is None else at)
    if at is None:
        assert verdict.differences == ()
    else:
        (found,) = verdict.differences
        assert (found.stage, found.position, found.is_tie) == ("logits", at, differences[-1] <= 1e-3)


def test_what_the_largest_difference_is_of() -> None:
    """Padding is not compared, infinities are alike; what is no number, or not shown by both, differs infinitely."""

    def logits(*values: float) -> scores.Scores:
        return scores.of_logits(np.array(values, np.float32))

    def shown(token: int, **top: float) -> scores.Scores:
        pairs = tuple((int(name[1:]), value) for name, value in top.items())
        return scores.of_logprobs(TokenLogprob(token, dict(pairs)[token], 1, pairs))

    assert scores.gap(logits(1, 2), logits(1, 4, 9), (0, 1))[:3] == ("logits", 2, 1)
    assert scores.gap(logits(-np.inf, 2), logits(-np.inf, 2), (0, 1)).largest == 0
    assert scores.gap(logits(-np.inf, 2), logits(0, 2), (0, 1)).largest == np.inf
    assert scores.gap(logits(np.nan, 2), logits(0, 2), (0, 1)).largest == np.inf
    assert scores.gap(shown(1, t1=-0.5), shown(2, t2=-0.5), (1, 2)).largest == np.inf
    half = float(np.log(0.5))
    mixed = scores.gap(logits(3, 3), shown(1, t1=half - 0.25), (0, 1))  # a constant in all logits changes nothing
    assert (mixed.unit, mixed.at) == ("log-probabilities", 1)
    assert (mixed.largest, mixed.reference, mixed.other[0]) == (pytest.approx(0.25), pytest.approx((half, half)), None)


# ---------------------------------------------------------------------------------------- runners elsewhere


def test_a_runner_over_http_step_by_step(compare: Compare) -> None:
    with server_support.serving() as served:
        http = {"runner": {"type": "http", "url": served.url}, "tokenizer": "simple"}
        for seeded in ((), ("--temperature", "1", "--top-k", "9")):
            result = compare({}, http, "--json", *seeded)
            assert result.exit_code == 0, result.output
            comparison = compared(result)
            assert comparison["unit"] == "log-probabilities"
            assert comparison["largest_difference"] < 1e-5
        row = chain(IDS)
        second = int(np.argsort(-row)[1])
        nudged = {"runner": {"type": "nudged", "token": second, "amount": 5.0}}
        found = the_difference(compare(nudged, http, *ONE))
        assert (found["stage"], found["logits"]["unit"]) == ("logits", "log-probabilities")
        assert found["logits"]["tokens"] == [second, int(row.argmax())]


def like_vllm(asked: Asked, wire: Wire) -> None:
    """Completions in ids with log-probabilities: greedily the mock runner's, else always the second likeliest token."""
    if asked.path == "/v1/models":
        wire.json({"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]})
    elif asked.path == "/detokenize":
        wire.json({"prompt": TOKENIZER.decode(asked.json["tokens"])})
    elif asked.path != "/v1/completions":
        wire.json({}, 404)
    elif not asked.json.get("stream"):
        wire.json({"choices": [{"text": "", "token_ids": [0]}]})
    else:
        context, events = list(asked.json["prompt"]), []
        for left in reversed(range(asked.json["max_tokens"])):
            row = chain(context).astype(float)
            logprobs = row - np.log(np.exp(row).sum())
            order = np.argsort(-row, kind="stable").tolist()
            token = order[0 if asked.json["temperature"] == 0 else 1]
            scores = {
                "token_logprobs": [logprobs[token]],
                "top_logprobs": [{f"token_id:{i}": logprobs[i] for i in order[: asked.json["logprobs"]]}],
            }
            reason = None if left else "length"
            choice = {"index": 0, "text": "", "token_ids": [token], "logprobs": scores, "finish_reason": reason}
            events.append({"choices": [choice]})
            context.append(token)
        wire.events(*events, "[DONE]")


def test_a_server_that_answers_whole_completions(compare: Compare) -> None:
    """In ids, with the log-probabilities of a few tokens."""
    with ScriptedServer(like_vllm) as server:
        http = {"model": "mock", "runner": {"type": "http", "url": server.url}, "eos": []}
        result = compare({"eos": []}, http, "--json", "--max-tokens", "8")
        assert result.exit_code == 0, result.output
        comparison = compared(result)
        assert (comparison["unit"], comparison["prompts"]) == ("log-probabilities", len(BUILT_IN))
        assert comparison["equal_tokens"] == 8 * len(BUILT_IN)
        assert comparison["largest_difference"] < 1e-5

        row = chain(IDS).astype(float)
        best, second, third = np.argsort(-row)[:3].tolist()
        nudged = {"runner": {"type": "nudged", "token": third, "amount": 5.0}}
        found = the_difference(compare(nudged, http, *ONE))
        assert (found["stage"], found["logits"]["unit"], found["position"]) == ("logits", "log-probabilities", 0)
        assert found["logits"]["tokens"] == [third, best]
        logprobs = row - np.log(np.exp(row).sum())
        assert found["logits"]["other"] == pytest.approx([logprobs[third], logprobs[best]])

        found = the_difference(compare({}, http, *ONE, "--temperature", "0.0001"))
        assert (found["stage"], found["logits"]["tokens"]) == ("sampler", [best, second])


def test_a_runner_that_shows_tokens_alone(compare: Compare) -> None:
    second = int(np.argsort(-chain(IDS))[1])
    opaque = {"runner": {"type": "opaque", "token": second, "amount": 9.0}}
    assert compare({}, {"runner": {**opaque["runner"], "amount": 0.0}}, "--json").exit_code == 0
    found = the_difference(compare({}, opaque, *ONE))
    assert (found["stage"], found["position"], found["logits"]) == ("unseen", 0, None)
    assert "by its logits or by its sampler, which b.yaml does not show" in found["sentence"]
    # Whose logits are shown can be at fault all the same.
    found = the_difference(compare({"runner": "coarse", "sampler": "numpy@last-of-ties"}, opaque, *ONE))
    assert found["stage"] == "sampler"
    refused = compare({}, opaque, *ONE, "--temperature", "1")
    assert refusal(refused) == "b.yaml: its runner does not support seed"


def test_a_server_that_takes_text_and_gives_text(compare: Compare) -> None:
    """Of which only texts can be compared."""
    with serve_support.serving() as served:
        runner = {"type": "http", "url": served.url, "dialect": "openai"}
        http = {"tokenizer": "auto", "model": "mock", "runner": runner}
        equal = compare({}, http, "--prompt", PROMPT)
        assert equal.exit_code == 0, equal.output
        assert "not shown" in equal.stdout
        nudged = {"runner": {"type": "nudged", "token": 5, "amount": 30.0}}
        found = the_difference(compare(nudged, http, *ONE))
        assert (found["stage"], found["position"], found["logits"]) == ("unseen", None, None)
        assert "after 0 characters" in found["sentence"]
        assert found["sentence"].endswith("b.yaml shows text and no tokens")


# -------------------------------------------------------------------------------------- perplexity

LONG = "the word of the world is not what you had by all " * 12


def scored(ids: list[int], before: list[int]) -> list[float]:
    """Log-probabilities of the tokens of a text, window by window, without any cache."""
    logprobs: list[float] = []
    size = 256 - len(before)
    for start in range(0, len(ids), size):
        window = before + ids[start : start + size]
        rows = chain_logits(chain_states(window), TOKENIZER.vocab_size).astype(float)
        norms = np.log(np.exp(rows).sum(axis=1))
        first = len(before) or 1
        logprobs += [float(rows[i - 1, window[i]] - norms[i - 1]) for i in range(first, len(window))]
    return logprobs


@pytest.mark.parametrize(("tokenizer", "before"), [("simple", []), ("with_bos", [1])])
def test_perplexity(compare: Compare, tmp_path: Path, tokenizer: str, before: list[int]) -> None:
    Path("text.txt").write_text(LONG)
    ids = TOKENIZER.encode(LONG)
    assert len(ids) > 256
    wanted = scored(ids, before)
    other = {"runner": {"type": "mock", "seed": 3}, "tokenizer": tokenizer}
    chunks = {"scheduler": {"max_num_batched_tokens": 32}, "tokenizer": tokenizer}
    result = compare({"tokenizer": tokenizer}, chunks, other, *ONE, "--text", "text.txt")
    document = json.loads(result.stdout)
    told = [c["perplexity"] for c in document["configurations"].values()]
    spelled = sum(len(TOKENIZER.token_bytes(i)) for i in ids) - (0 if before else _first_bytes(ids))
    assert told[0]["scored_tokens"] == len(wanted)
    assert told[0]["value"] == pytest.approx(np.exp(-np.mean(wanted)))
    assert told[0]["bits_per_byte"] == pytest.approx(-np.sum(wanted) / np.log(2) / spelled)
    assert told[1] == told[0]
    same, changed = (c["perplexity_increase"] for c in document["comparisons"])
    assert same == {"ratio": 0, "error": 0}
    assert changed["ratio"] == pytest.approx(told[2]["value"] / told[0]["value"] - 1)
    assert changed["error"] > 0


def _first_bytes(ids: list[int]) -> int:
    """What the first tokens of the windows stand for, which nothing precedes."""
    return sum(len(TOKENIZER.token_bytes(ids[i])) for i in range(0, len(ids), 256))


def test_perplexities_of_other_tokens_are_told_apart(compare: Compare) -> None:
    Path("text.txt").write_text(LONG)
    result = compare({}, {"tokenizer": "letters"}, "--prompt", PROMPT, "--text", "text.txt")
    assert "b.yaml makes other tokens of the text, so only bits per byte can be compared." in result.stdout


def test_perplexity_over_http(compare: Compare) -> None:
    Path("text.txt").write_text(LONG)
    with server_support.serving() as served:
        http = {"runner": {"type": "http", "url": served.url}}
        result = compare({}, http, *ONE, "--text", "text.txt")
    assert abs(compared(result)["perplexity_increase"]["ratio"]) < 1e-6
    with serve_support.serving() as served:
        completions = {"model": "mock", "runner": {"type": "http", "url": served.url, "dialect": "openai"}}
        result = compare({}, completions, "--prompt", PROMPT, "--text", "text.txt")
    assert result.exit_code == 0
    assert "b.yaml: its runner does not score prompts." in result.stdout


def test_sequences_shorter_than_a_window(compare: Compare) -> None:
    Path("text.txt").write_text(LONG)
    result = compare({}, {"scheduler": {"max_model_len": 100}}, "--prompt", PROMPT, "--text", "text.txt")
    assert "b.yaml: its sequences hold 100 tokens, and a window has 256." in result.stdout


def test_texts_that_are_too_unlikely(compare: Compare) -> None:
    """JSON has no infinity, and a mean with one in it says nothing."""
    Path("text.txt").write_text(LONG)
    result = compare({}, {"runner": "extreme"}, "--prompt", "x", "--max-tokens", "1", "--text", "text.txt", "--json")
    document = json.loads(result.stdout, parse_constant=pytest.fail)
    perplexity = document["configurations"]["b.yaml"]["perplexity"]
    assert (perplexity["value"], perplexity["bits_per_byte"] > 1e4) == (None, True)
    assert compared(result)["perplexity_increase"] == {"ratio": None, "error": None}
    result = compare({}, {"runner": "spaceless"}, "--prompt", "x", "--max-tokens", "1", "--text", "text.txt")
    assert "b.yaml: its logits give a token of the text no probability." in result.stdout


# -------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("tokenizer", "stages"),
    [
        ("simple", set()),
        ("letters", {"tokenizer"}),
        ("other_template", {"template"}),
        ("no_template", {"template"}),
        ("other_bytes", {"tokenizer"}),
        ("other_end", {"stop"}),
        ("with_bos", {"tokenizer"}),
    ],
)
def test_tokenizers_alone(compare: Compare, tokenizer: str, stages: set[str]) -> None:
    result = compare({}, {"tokenizer": tokenizer}, "--tokenizers", "--json")
    assert {d["stage"] for d in compared(result)["differences"]} == stages
    assert result.exit_code == bool(stages)


def test_other_vocabularies(compare: Compare) -> None:
    result = compare({}, {"runner": "numpy", "tokenizer": "auto"}, "--tokenizers")
    assert result.exit_code == 1
    assert "b.yaml, vocabulary: tokenizer" in result.stdout
    assert "a.yaml has 125 entries, b.yaml 1500" in result.stdout


def test_ids_beyond_the_vocabulary(compare: Compare) -> None:
    result = compare({}, {"tokenizer": "other_types"}, "--tokenizers", "--prompt", "beyond", "--json")
    assert the_difference(result)["stage"] == "tokenizer"
    assert json.loads(result.stdout)["configurations"]["b.yaml"]["eos_ids"] == ["2"]  # whatever it is, it is shown


def test_a_tokenizer_that_raises(compare: Compare) -> None:
    """Whatever it is, it ends in a sentence."""
    raises = {"tokenizer": {"type": "raises", "method": "token_bytes"}}
    sentence = "b.yaml: the tokenizer failed: KeyError: 'its vocabulary'"
    assert refusal(compare({}, raises, "--tokenizers"), 4) == sentence
    result = compare({}, raises, *ONE)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (4, f"error: {sentence}")


# --------------------------------------------------------------------------------------- bad input


def refusal(result: Result, status: int = 2) -> str:
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


def test_too_few_configurations(compare: Compare) -> None:
    assert refusal(compare({})) == (
        "compare takes two configurations or more, not 1; "
        "for example: nanovllm compare a.yaml b.yaml, or a.yaml --profile one --profile other"
    )


def test_a_missing_file(compare: Compare) -> None:
    assert refusal(compare({}, "nowhere.yaml")).startswith("configuration file nowhere.yaml cannot be read: ")


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", b"\n  \n", "p.txt holds no prompt; write one on each line"),
        ("p.txt", b"caf\xe9\n", "p.txt is no text: byte 3 is not UTF-8"),
        ("p.txt", b"a\0b", "p.txt is no text: byte 1 is a NUL"),
        ("p.jsonl", b"{", "p.jsonl, line 1: not usable JSON: "),
        ("p.jsonl", b"\n[1]", "p.jsonl, line 2: a prompt is an object with 'prompt' or 'messages', not [1]"),
        ("p.jsonl", b'{"prompt": "a", "messages": []}', "p.jsonl, line 1: a prompt is an object with "),
        ("p.jsonl", b'{"prompt": "a", "top_k": 2}', "p.jsonl, line 1: unknown field 'top_k'; sampling parameters are "),
        ("p.jsonl", b'{"prompt": ""}', "p.jsonl, line 1: a prompt is empty; "),
        ("p.jsonl", b'{"prompt": 3}', "p.jsonl, line 1: 'prompt' must be a text, not 3"),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}', "p.jsonl, line 1: messages[0] needs a text under 'content'"),
    ],
)
def test_prompt_files(compare: Compare, name: str, data: bytes, sentence: str) -> None:
    Path(name).write_bytes(data)
    assert refusal(compare({}, {}, "--prompts", name)).startswith(sentence)


def test_texts_for_perplexity(compare: Compare) -> None:
    Path("short.txt").write_text("the word")
    Path("binary.txt").write_bytes(bytes(range(200)))
    assert refusal(compare({}, {}, "--text", "short.txt")) == (
        "a.yaml: the text has 3 tokens, which is too short for a perplexity; "
        "give one of which 16 tokens or more can be scored"
    )
    assert refusal(compare({}, {}, "--text", "binary.txt")) == "binary.txt is no text: byte 128 is not UTF-8"
    assert refusal(compare({}, {}, "--text", "none.txt")).startswith("none.txt cannot be read: ")


def test_a_configuration_that_cannot_be_loaded(compare: Compare) -> None:
    """The others are compared, and the status is the failure's."""
    broken = {"runner": "nothing-such"}
    result = compare(broken, {}, {"runner": {"type": "mock", "seed": 1}}, *ONE)
    assert result.exit_code == 3
    assert result.stderr.startswith("error: a.yaml: no runner named 'nothing-such' is installed")
    document = json.loads(result.stdout)
    assert (document["reference"], document["differs"]) == ("b.yaml", True)
    assert set(document["failures"]) == {"a.yaml"}
    assert refusal(compare(broken, {}, *ONE), 3).startswith("a.yaml: no runner named 'nothing-such'")


def test_prompts_from_files(compare: Compare) -> None:
    Path("p.txt").write_text("what is\n\nthe word\n")
    Path("p.jsonl").write_text('{"id": 1, "prompt": "what"}\n{"messages": [{"role": "user", "content": "word"}]}\n')
    lines = json.loads(compare({}, {}, "--prompts", "p.txt", "--prompt", "you", "--json").stdout)
    assert lines["prompts"] == ["you", "what is", "the word"]
    objects = json.loads(compare({}, {}, "--prompts", "p.jsonl", "--json").stdout)
    assert objects["prompts"] == ["what", [{"role": "user", "content": "word"}]]
    chats = json.loads(compare({}, {}, "--prompts", "p.txt", "--chat", "--json").stdout)
    assert chats["prompts"][0] == [{"role": "user", "content": "what is"}]


def test_profiles_of_one_file(compare: Compare) -> None:
    profiles = {"profiles": {"one": {}, "other": {"runner": {"type": "mock", "seed": 1}}}}
    result = compare(profiles, "--profile", "one", "--profile", "other", "--prompt", PROMPT)
    assert result.exit_code == 1
    assert "a.yaml other, prompt 1 ('what is the word'), token 0: logits: a.yaml one drew" in result.stdout
    assert refusal(compare(profiles, profiles, "--profile", "none")).startswith("there is no profile 'none'")


def test_lines_of_prompt_files(compare: Compare) -> None:
    """A byte order mark is no text, CR LF ends a line, and U+2028 does not."""
    Path("p.jsonl").write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}'.encode())
    Path("p.txt").write_bytes("\ufeffa\x0cb\r\nc\n".encode())
    for name, prompts in (("p.jsonl", ["a\u2028b", "c"]), ("p.txt", ["a\x0cb", "c"])):
        assert json.loads(compare({}, {}, "--prompts", name, "--json").stdout)["prompts"] == prompts


@pytest.mark.parametrize(
    "words",
    [
        ("--chat",),
        ("--tokenizers", "--text", "x"),
        ("--tokenizers", "--temperature", "1"),
        ("--tolerance", "nan"),
        ("--tolerance", "-1"),
    ],
)
def test_options_that_make_no_sense(compare: Compare, words: tuple[str, ...]) -> None:
    result = compare({}, {}, *words)
    assert (result.exit_code, "Error: " in result.stderr) == (2, True)
