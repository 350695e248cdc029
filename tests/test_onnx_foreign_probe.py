"""The probe: what a graph can do is found, what it only claims is found out, and tokens are right all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import numpy_support
import onnx_support
from engine_support import ask, drive, greedy, make_engine
from foreign_graphs import CONFIG, FAULTS, RANGE, STYLES, write, write_all
from models_support import file_tensors, write_checkpoint
from nanovllm.errors import ConfigError, ModelError
from nanovllm_models.lanes import Work
from nanovllm_models.lanes.recomputed import Recomputed
from nanovllm_runner_onnx.foreign.runner import ForeignRunner, probe_model
from nanovllm_runner_onnx.model_files import find_onnx_model
from nanovllm_runner_onnx.options import OnnxOptions
from nanovllm_runner_onnx.session import settings_of
from support import DATA, needs_data

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

ALL = ["decodes", "prompts", "chunks", "mixed"]
PAST = "past and present"


def probed(path: Path) -> dict[str, object]:
    return probe_model(find_onnx_model(path), settings_of(OnnxOptions(), 1))


def make_runner(path: Path, **overrides) -> ForeignRunner:
    return onnx_support.make_runner(path, num_blocks=None, block_size=16, **overrides)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    return write_all(tmp_path_factory.mktemp("probed"))


@pytest.mark.parametrize(
    ("name", "style", "past", "batches", "padding"),
    [
        ("optimum", PAST, "grown", ALL, "right"),
        ("optimum-no-positions", PAST, "grown", ALL, "right"),
        ("optimum-int32", PAST, "grown", ALL, "right"),
        ("optimum-num-logits", PAST, "grown", ALL, "right"),
        # The last column must be a real token.
        ("optimum-last-logits", PAST, "grown", ALL, "left"),
        # Without a mask, only what is padded behind a prompt goes unseen.
        ("ids-only", PAST, "grown", ["prompts"], "right"),
        ("merged", "merged decoder", "grown", ALL, "right"),
        ("gpt2", f"{PAST} in one tensor per layer", "grown", ALL, "right"),
        # The operator refuses several rows of several tokens on top of a past.
        ("gqa", PAST, "shared rows", ["decodes", "prompts"], "right"),
        ("gqa-positions", PAST, "shared rows", ["decodes", "prompts"], "right"),
        ("gqa-last-logits", PAST, "shared rows", ["decodes"], "right"),
        ("no-past", "no past", "recomputed", ALL, "right"),
        ("no-past-ids-only", "no past", "recomputed", ALL, "right"),
        ("no-past-last-logits", "no past", "recomputed", ALL, "left"),
    ],
)
def test_what_sound_graphs_can_do(name, style, past, batches, padding, graphs):
    assert probed(graphs[1][name]) == {
        "style": style, "past": past, "chunked_prefill": True, "batches": batches, "padding": padding
    }  # fmt: skip


# (fault, style) -> past, chunked prefill, batches. None of these graphs raises an error by itself.
FOUND_OUT = {
    ("mask ignored", "optimum"): ("grown", True, ["prompts"]),
    ("mask ignored", "merged"): ("grown", True, ["prompts"]),
    ("mask ignored", "no-past"): ("recomputed", True, ALL),  # right padding lies behind every token
    ("positions ignored", "optimum"): ("grown", True, ["prompts"]),
    ("positions ignored", "gpt2"): ("grown", True, ["prompts"]),
    ("past ignored", "optimum"): ("recomputed", True, ALL),
    ("past ignored", "merged"): ("recomputed", True, ALL),
    ("past ignored by chunks", "optimum"): ("grown", False, ["decodes", "prompts"]),
    ("rows coupled", "optimum"): ("grown", True, []),
    ("rows coupled", "gqa"): ("shared rows", True, []),
    ("rows coupled", "no-past"): ("recomputed", True, []),
    ("new tokens first", "optimum"): ("grown", False, ["prompts"]),
    ("quantised together", "optimum"): ("grown", False, []),
}
# These raise one.
REFUSING = {
    ("one row", "optimum"): ("grown", True, []),
    ("one token on a past", "merged"): ("grown", False, ["decodes", "prompts"]),
}


@pytest.mark.parametrize(("fault", "style"), FOUND_OUT | REFUSING)
def test_what_a_graph_does_wrong_is_found_and_not_used(fault, style, graphs, tmp_path, caplog):
    """Tokens in company are those that the very same graph gives each sequence alone, computed from its beginning."""
    past, chunked, batches = (FOUND_OUT | REFUSING)[fault, style]
    path = write(tmp_path / "graph", graphs[0], fault=fault, **STYLES[style])
    found = probed(path)
    assert (found["past"], found["chunked_prefill"], found["batches"]) == (past, chunked, batches)
    assert ("past cannot be kept as grown" in caplog.text) == (fault == "past ignored")
    runner = make_runner(path)
    assert runner.info.can_chunk == chunked
    prompts = [np.random.default_rng(n).integers(4, CONFIG["vocab_size"], n).tolist() for n in (3, 20, 9, 31, 14)]
    wanted = answers(runner, prompts, max_num_seqs=1)
    assert answers(runner, prompts, max_num_seqs=4, max_num_batched_tokens=40) == wanted
    if fault == "quantised together":
        return  # its logits are its own
    runner._keeper = Recomputed(runner._keeper._decoder)
    assert answers(runner, prompts[:3], max_num_seqs=1) == wanted[:3]


def answers(runner: ForeignRunner, prompts: list[list[int]], **options) -> list[list[int]]:
    engine = make_engine(runner, **options)
    tickets = [ask(engine, p, greedy(9)) for p in prompts]
    found = drive(engine)
    return [found.ids(t) for t in tickets]


def test_a_sequence_of_a_graph_that_computes_otherwise_in_company_never_has_any(graphs, tmp_path, monkeypatch):
    runner = make_runner(write(tmp_path / "graph", graphs[0], fault="rows coupled"))
    runs: list[list[Work]] = []
    run = runner._keeper.run
    monkeypatch.setattr(runner._keeper, "run", lambda works, side: runs.append(works) or run(works, side))
    answers(runner, [[5, 6, 7], [8, 9], [10] * 5])
    assert len(runs) >= 27
    assert {len(works) for works in runs} == {1}


def test_padding_that_sees_nothing_and_becomes_nan_stays_on_the_side_where_it_sees_something(graphs, tmp_path):
    """Masked with -inf, a row that sees nothing is NaN, and its values poison the row's real tokens."""
    path = write(tmp_path / "right", graphs[0], fault="NaN")
    assert (probed(path)["batches"], probed(path)["padding"]) == (ALL, "right")
    # With logits of the last column, padding would have to be on the left: sequences with a past may be
    # together there, prompts may not.
    path = write(tmp_path / "left", graphs[0], fault="NaN", all_logits=False)
    assert (probed(path)["batches"], probed(path)["padding"]) == (["decodes", "chunks"], "left")


@pytest.mark.parametrize("style", ["optimum", "gqa-positions", "no-past"])
def test_a_graph_that_branches_by_length_gives_every_sequence_what_it_has_alone(style, graphs, tmp_path, caplog):
    """Texts of the probe are too short to show it: a long neighbour would change the rope of a short sequence."""
    path = write(tmp_path / "graph", graphs[0], fault="two ranges", **STYLES[style])
    linear = write_checkpoint(tmp_path / "long", CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    short_rope, long_rope = (numpy_support.Driver(numpy_support.make_runner(p)) for p in (graphs[0], linear))

    def expected(tokens: list[int]) -> list[int]:
        for _ in range(9):
            driver = short_rope if len(tokens) <= RANGE else long_rope
            tokens = [*tokens, int(driver.logits(tokens)[-1].argmax())]
        return tokens[-9:]

    prompts = [np.random.default_rng(n).integers(4, CONFIG["vocab_size"], n).tolist() for n in (5, 45, 28)]
    found = probed(path)
    assert (found["past"], found["chunked_prefill"], found["batches"]) == ("recomputed", True, [])
    for options in ({}, {"max_num_batched_tokens": 10}):
        assert answers(make_runner(path), prompts, **options) == [expected(p) for p in prompts]
    assert "branches by length" in caplog.text
    assert f"max_model_len of {RANGE} or less avoids that" in caplog.text
    caplog.clear()
    within = make_runner(path, max_model_len=RANGE)
    assert within.info.description["batches"] == probed(graphs[1][style])["batches"]
    assert answers(within, [prompts[0], prompts[2][:23]]) == [expected(prompts[0]), expected(prompts[2][:23])]
    assert not caplog.text


def test_graphs_that_compute_no_prompt_are_refused(graphs, tmp_path):
    with pytest.raises(ModelError, match=r"cannot compute a prompt of 9 tokens without a past.*Reshape.*; export it"):
        probed(write(tmp_path / "one", graphs[0], fault="one token on a past"))
    with pytest.raises(ModelError, match="another answer every time"):
        probed(write(tmp_path / "random", graphs[0], fault="random"))
    tensors = {name: np.full_like(t, np.nan) for name, t in file_tensors(CONFIG).items()}
    nan = write_checkpoint(tmp_path / "nan", CONFIG, tensors)
    with pytest.raises(ModelError, match="logits are not finite"):
        probed(write(tmp_path / "nan-graph", nan))


def test_a_vocabulary_of_none_is_refused(graphs):
    path = graphs[1]["no-past"] / "empty.onnx"
    model = onnx.load(path.with_name("model.onnx"))
    last = model.graph.node[-1]
    last.op_type, last.input[:] = "Slice", [last.input[0], "zero", "zero", "axis"]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array([n]), name) for n, name in ((0, "zero"), (2, "axis"))
    )
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "vocab"
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"logits of shape \[1, 9, 0\]"):
        probed(path)


def test_more_positions_than_the_graph_has_are_refused_at_load(graphs, tmp_path):
    """config.json may say more than the graph's tables hold, or the user may."""
    path = write(tmp_path / "graph", graphs[0], fault="table of positions")
    assert make_runner(path, max_model_len=50).info.max_model_len == 50
    with pytest.raises(ConfigError, match="does not reach the last of 96 positions"):
        make_runner(path)


@needs_data
def test_a_graph_without_a_model_in_it_is_refused():
    """Constants of fixed shape instead of logits."""
    with pytest.raises(ModelError, match=r"logits of shape \[2, 2, 32\]"):
        probed(DATA / "onnx" / "engine-dummy-decoder")


def test_every_fault_is_tried():
    others = {"NaN", "random", "table of positions", "table of columns", "two ranges"}
    assert {fault for fault, _ in FOUND_OUT | REFUSING} | others == set(FAULTS)


def test_no_run_has_no_rows_or_no_columns(graphs, monkeypatch):
    """ONNX Runtime's process dies of either (SIGFPE), or answers with nonsense."""
    import onnxruntime as ort

    shapes = set()
    bind = ort.IOBinding.bind_cpu_input

    def noting(self, name, array):
        shapes.add((name, array.shape))
        return bind(self, name, array)

    monkeypatch.setattr(ort.IOBinding, "bind_cpu_input", noting)
    for path in graphs[1].values():
        answers(make_runner(path), [[5, 6, 7], [8], [9, 10]])
    assert {name for name, _ in shapes} == {
        "input_ids", "attention_mask", "position_ids", "use_cache_branch", "num_logits_to_keep"
    }  # fmt: skip
    assert all(0 not in shape for _, shape in shapes)
