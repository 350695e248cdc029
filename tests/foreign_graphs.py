"""Writes a llama checkpoint as ONNX graphs the way other exporters do, in plain operators; and broken ones.

The oracle for all of them is the NumPy runner on the same checkpoint. A `fault` is a way in which a graph may
differ from what its inputs promise; those found in the wild are silent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models_support import LLAMA, write_checkpoint
from nanovllm_models import Checkpoint, load_checkpoint, rotary_frequencies

CONFIG = LLAMA | {"vocab_size": 131, "hidden_size": 32, "head_dim": 16, "max_position_embeddings": 96}

# Of every style, what `write` is to be told.
STYLES: dict[str, dict[str, Any]] = {
    "optimum": {},
    "optimum-no-positions": {"inputs": ("input_ids", "attention_mask")},
    "optimum-int32": {"ints": np.int32},
    "optimum-last-logits": {"all_logits": False},
    "optimum-num-logits": {"inputs": ("input_ids", "attention_mask", "position_ids", "num_logits_to_keep")},
    "ids-only": {"inputs": ("input_ids",)},
    "merged": {"style": "merged"},
    "gpt2": {"style": "gpt2", "ints": np.int32},
    "gqa": {"style": "gqa", "inputs": ("input_ids", "attention_mask")},
    "gqa-positions": {"style": "gqa"},
    "gqa-last-logits": {"style": "gqa", "inputs": ("input_ids", "attention_mask"), "all_logits": False},
    "no-past": {"style": "no past"},
    "no-past-ids-only": {"style": "no past", "inputs": ("input_ids",)},
    "no-past-last-logits": {"style": "no past", "all_logits": False},
}

FAULTS = (
    "mask ignored", "positions ignored", "past ignored", "past ignored by chunks", "rows coupled", "one row",
    "one token on a past", "random", "NaN", "quantised together", "new tokens first",
    "table of positions", "table of columns", "two ranges",
)  # fmt: skip
RANGE = 32  # tokens, of the fault "two ranges"


class Writer:
    """Nodes of one graph or branch; initializers are shared."""

    def __init__(self, prefix: str = "", initializers: dict[str, onnx.TensorProto] | None = None) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.initializers = {} if initializers is None else initializers

    def op(self, kind: str, *inputs: str, name: str | None = None, domain: str = "", **attributes: Any) -> str:
        name = name or f"{self.prefix}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def ops(self, kind: str, *inputs: str, names: Sequence[str], domain: str = "", **attributes: Any) -> list[str]:
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return list(names)

    def array(self, name: str, array: Any, dtype: Any = np.float32) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.array(array, dtype, order="C"), name)
        return name

    def ints(self, *values: int) -> str:
        return self.array(f"ints_{'_'.join(map(str, values))}", values, np.int64)

    def scalar(self, value: float, dtype: Any = np.float32) -> str:
        return self.array(f"scalar_{np.dtype(dtype).name}_{value}", value, dtype)

    def size(self, x: str, axis: int) -> str:
        """A scalar int64."""
        return self.op("Gather", self.op("Shape", x), self.scalar(axis, np.int64), axis=0)

    def range(self, count: str) -> str:
        return self.op("Range", self.scalar(0, np.int64), count, self.scalar(1, np.int64))


class Llama:
    def __init__(self, w: Writer, model: Checkpoint, style: str, inputs: Sequence[str], fault: str | None) -> None:
        self.w, self.model, self.style, self.inputs, self.fault = w, model, style, inputs, fault
        self.spec = model.spec
        self.attention = model.spec.attention
        self.has_past = style != "no past"

    def linear(self, x: str, name: str) -> str:
        return self.w.op("MatMul", x, self.w.array(name, self.weight(f"{name}.weight").T))

    def weight(self, name: str) -> np.ndarray:
        return np.asarray(self.model.weights[name].array, np.float32)

    def norm(self, x: str, name: str) -> str:
        w = self.w
        mean = w.op("ReduceMean", w.op("Mul", x, x), axes=[-1], keepdims=1)
        x = w.op("Div", x, w.op("Sqrt", w.op("Add", mean, w.scalar(self.spec.norm.eps))))
        return w.op("Mul", x, w.array(name, self.weight(f"{name}.weight")))

    def past(self, layer: int) -> tuple[str, str]:
        """Keys and values (B, kv heads, past, head size)."""
        if self.style == "gpt2":
            both = f"past_{layer}"
            return tuple(self.w.op("Gather", both, self.w.scalar(i, np.int64), axis=0) for i in (0, 1))
        return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"

    def prepare(self) -> None:
        """Columns, positions, what each token sees."""
        w, fault = self.w, self.fault
        if self.style == "gqa":  # the operator sees to it all, but for positions that are given
            if "position_ids" in self.inputs:
                self.prepare_rotation(w.op("Cast", "position_ids", to=TensorProto.FLOAT))
            return
        self.num_new = w.size("input_ids", 1)
        if self.has_past:
            first, _ = self.past(0)
            self.num_past = w.size(first, 2)
        else:
            self.num_past = w.scalar(0, np.int64)
        own = w.op("Add", w.range(self.num_new), self.num_past)  # (S,) columns
        mask = w.op("Cast", "attention_mask", to=TensorProto.INT64) if "attention_mask" in self.inputs else None
        if fault == "table of columns":
            own = w.op("Gather", w.array("columns", np.arange(self.spec.max_positions), np.int64), own)
        if "position_ids" in self.inputs and fault != "positions ignored":
            positions = "position_ids"
            if fault == "table of positions":  # a short one
                positions = w.op("Gather", w.array("table", np.arange(50), np.int64), positions)
            positions = w.op("Cast", positions, to=TensorProto.FLOAT)
        elif mask is not None and fault != "positions ignored":
            counted = w.op("Sub", w.op("CumSum", mask, w.scalar(1, np.int64)), w.scalar(1, np.int64))
            counted = w.op("Gather", w.op("Max", counted, w.scalar(0, np.int64)), own, axis=1)
            positions = w.op("Cast", counted, to=TensorProto.FLOAT)
        else:
            positions = w.op("Unsqueeze", w.op("Cast", own, to=TensorProto.FLOAT), w.ints(0))
        self.prepare_rotation(positions)
        total = w.op("Add", self.num_past, self.num_new)
        columns = w.op("Unsqueeze", w.range(total), w.ints(0))  # (1, T)
        seen = w.op("LessOrEqual", columns, w.op("Unsqueeze", own, w.ints(1)))  # (S, T)
        if fault == "past ignored" or fault == "past ignored by chunks":
            is_new = w.op("GreaterOrEqual", columns, self.num_past)
            if fault == "past ignored by chunks":
                is_new = w.op("Or", is_new, w.op("Equal", self.num_new, w.scalar(1, np.int64)))
            seen = w.op("And", seen, is_new)
        seen = w.op("Unsqueeze", seen, w.ints(0, 1))  # (1, 1, S, T)
        if mask is not None and fault != "mask ignored":
            seen = w.op("And", seen, w.op("Cast", w.op("Unsqueeze", mask, w.ints(1, 2)), to=TensorProto.BOOL))
        lowest = -np.inf if fault == "NaN" else np.finfo(np.float32).min
        self.bias = w.op("Where", seen, w.scalar(0), w.scalar(lowest))

    def prepare_rotation(self, positions: str) -> None:
        w = self.w
        freqs, _ = rotary_frequencies(self.attention.rotary[0], self.spec.max_positions)
        rates = w.array("freqs", freqs)
        if self.fault == "two ranges":  # a longer run has other frequencies, as longrope in onnxruntime-genai's graphs
            is_long = w.op("Greater", w.size("attention_mask", 1), w.scalar(RANGE, np.int64))
            halves = {}
            for half, name in (("then", w.array("slow", freqs / 4)), ("else", rates)):
                node = helper.make_node("Identity", [name], [f"{half}_rates"])
                result = helper.make_empty_tensor_value_info(f"{half}_rates")
                halves[f"{half}_branch"] = helper.make_graph([node], half, [], [result])
            rates = w.op("If", is_long, **halves)
        angles = w.op("Mul", w.op("Unsqueeze", positions, w.ints(1, 3)), rates)  # (B, 1, S, half)
        self.cos, self.sin = w.op("Cos", angles), w.op("Sin", angles)

    def heads(self, x: str, count: int) -> str:
        w = self.w
        rows = 1 if self.fault == "one row" else 0
        tokens = 1 if self.fault == "one token on a past" and self.has_past else -1
        x = w.op("Reshape", x, w.ints(rows, tokens, count, self.attention.head_size))
        return w.op("Transpose", x, perm=[0, 2, 1, 3])

    def rotate(self, x: str) -> str:
        w = self.w
        a, b = w.ops("Split", x, names=[f"{x}_a", f"{x}_b"], axis=-1)
        left = w.op("Sub", w.op("Mul", a, self.cos), w.op("Mul", b, self.sin))
        right = w.op("Add", w.op("Mul", b, self.cos), w.op("Mul", a, self.sin))
        return w.op("Concat", left, right, axis=-1)

    def attend(self, layer: int, q: str, k: str, v: str) -> str:
        """(B, S, heads * head_size)."""
        if self.style == "gqa":
            return self.grouped(layer, q, k, v)
        w, a = self.w, self.attention
        q, k, v = self.rotate(self.heads(q, a.num_heads)), self.rotate(self.heads(k, a.num_kv_heads)), self.heads(
            v, a.num_kv_heads
        )  # fmt: skip
        if self.has_past:
            pasts = self.past(layer)
            order = (lambda old, new: (new, old)) if self.fault == "new tokens first" else (lambda old, new: (old, new))
            k, v = (w.op("Concat", *order(old, new), axis=2) for old, new in zip(pasts, (k, v), strict=True))
        if self.style == "gpt2":
            both = (w.op("Unsqueeze", x, w.ints(0)) for x in (k, v))
            w.op("Concat", *both, axis=0, name=f"{w.prefix}present_{layer}")
        elif self.has_past or self.style == "merged":
            w.op("Identity", k, name=f"{w.prefix}present.{layer}.key")
            w.op("Identity", v, name=f"{w.prefix}present.{layer}.value")
        of_head = w.array("kv_of_head", np.repeat(np.arange(a.num_kv_heads), a.num_heads // a.num_kv_heads), np.int64)
        k, v = (w.op("Gather", x, of_head, axis=1) for x in (k, v))
        scores = w.op("MatMul", q, w.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = w.op("Add", w.op("Mul", scores, w.scalar(a.scale)), self.bias)
        mixed = w.op("MatMul", w.op("Softmax", scores, axis=-1), v)
        mixed = w.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return w.op("Reshape", mixed, w.ints(0, -1, a.num_heads * a.head_size))

    def grouped(self, layer: int, q: str, k: str, v: str) -> str:
        w, a = self.w, self.attention
        freqs, _ = rotary_frequencies(a.rotary[0], self.spec.max_positions)
        angles = np.arange(self.spec.max_positions)[:, None] * freqs
        if layer == 0:
            lens = w.op("Sub", w.op("ReduceSum", "attention_mask", w.ints(1), keepdims=0), w.scalar(1, np.int64))
            self.lens = w.op("Cast", lens, to=TensorProto.INT32)
            self.total = w.op("Cast", w.size("attention_mask", 1), to=TensorProto.INT32)
        name, is_rotated = f"attended_{layer}", "position_ids" in self.inputs
        if is_rotated:
            q, k = (self.rotate(self.heads(x, n)) for x, n in ((q, a.num_heads), (k, a.num_kv_heads)))
            q, k = (w.op("Reshape", w.op("Transpose", x, perm=[0, 2, 1, 3]), w.ints(0, 0, -1)) for x in (q, k))
            tables = []
        else:
            tables = [w.array("cos", np.cos(angles)), w.array("sin", np.sin(angles))]
        w.ops(
            "GroupQueryAttention", q, k, v, *self.past(layer), self.lens, self.total, *tables,
            names=[name, f"present.{layer}.key", f"present.{layer}.value"], domain="com.microsoft",
            num_heads=a.num_heads, kv_num_heads=a.num_kv_heads, do_rotary=int(not is_rotated), scale=a.scale,
        )  # fmt: skip
        return name

    def logits(self, all_logits: bool) -> str:
        w, fault = self.w, self.fault
        self.prepare()
        x = w.op("Gather", w.array("embed", self.weight("embed.tokens.weight")), "input_ids", axis=0)
        for i in range(self.spec.num_layers):
            h = self.norm(x, f"layers.{i}.attn_norm")
            q, k, v = (self.linear(h, f"layers.{i}.attn.{p}") for p in "qkv")
            x = w.op("Add", x, self.linear(self.attend(i, q, k, v), f"layers.{i}.attn.out"))
            h = self.norm(x, f"layers.{i}.mlp_norm")
            gate, up = self.linear(h, f"layers.{i}.mlp.gate"), self.linear(h, f"layers.{i}.mlp.up")
            gate = w.op("Mul", gate, w.op("Sigmoid", gate))
            x = w.op("Add", x, self.linear(w.op("Mul", gate, up), f"layers.{i}.mlp.down"))
            if fault == "quantised together":
                quantised = [f"{w.prefix}quantised_{i}_{part}" for part in ("x", "scale", "zero")]
                x = w.op("DequantizeLinear", *w.ops("DynamicQuantizeLinear", x, names=quantised))
        if "num_logits_to_keep" in self.inputs:
            first = w.op("Unsqueeze", w.op("Neg", "num_logits_to_keep"), w.ints(0))
            x = w.op("Slice", x, first, w.ints(2**31), w.ints(1))
        if not all_logits:
            x = w.op("Gather", x, w.ints(-1), axis=1)
        logits = self.linear(self.norm(x, "final_norm"), "embed.tokens" if self.spec.tied_embeddings else "lm_head")
        if fault == "rows coupled":
            mean = w.op("ReduceMean", logits, axes=[0], keepdims=1)
            logits = w.op("Add", logits, w.op("Mul", mean, w.scalar(0.02)))
        if fault == "random":
            logits = w.op("Add", logits, w.op("RandomNormalLike", logits))
        return w.op("Identity", logits, name=f"{w.prefix}logits")


def write(
    path: Path,
    checkpoint: Path,
    *,
    style: str = "optimum",
    inputs: Sequence[str] = ("input_ids", "attention_mask", "position_ids"),
    ints: Any = np.int64,
    all_logits: bool = True,
    fault: str | None = None,
) -> Path:
    """A directory of model.onnx and config.json for the weights of a llama checkpoint's directory."""
    assert fault is None or fault in FAULTS, fault
    model = load_checkpoint(checkpoint)
    a = model.spec.attention
    integer = helper.np_dtype_to_tensor_dtype(np.dtype(ints))
    values = helper.make_tensor_value_info
    shapes = {"attention_mask": ["batch", "total"], "num_logits_to_keep": []}
    graph_inputs = [values(name, integer, shapes.get(name, ["batch", "new"])) for name in inputs]
    outputs = [values("logits", TensorProto.FLOAT, ["batch", "new" if all_logits else 1, model.spec.vocab_size])]
    for i in range(model.spec.num_layers if style != "no past" else 0):
        kinds = [""] if style == "gpt2" else [".key", ".value"]
        past, present = ("past_", "present_") if style == "gpt2" else ("past_key_values.", "present.")
        for kind in kinds:
            for into, prefix, length in ((graph_inputs, past, "past"), (outputs, present, "longer")):
                shape = [2] * (style == "gpt2") + ["batch", a.num_kv_heads, length, a.head_size]
                into.append(values(f"{prefix}{i}{kind}", TensorProto.FLOAT, shape))
    w = Writer()
    if style == "merged":
        graph_inputs.append(values("use_cache_branch", TensorProto.BOOL, [1]))
        branches = {}
        for branch, has_past in (("then", True), ("else", False)):
            inner = Writer(f"{branch}_", w.initializers)
            part = Llama(inner, model, style, inputs, fault)
            part.has_past = has_past
            part.logits(all_logits)
            results = [helper.make_empty_tensor_value_info(f"{branch}_{o.name}") for o in outputs]
            branches[f"{branch}_branch"] = helper.make_graph(inner.nodes, branch, [], results)
        w.ops("If", "use_cache_branch", names=[o.name for o in outputs], **branches)
    else:
        Llama(w, model, style, inputs, fault).logits(all_logits)
    graph = helper.make_graph(w.nodes, "decoder", graph_inputs, outputs, list(w.initializers.values()))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    path.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path / "model.onnx")
    facts = {"max_position_embeddings": model.spec.max_positions, "vocab_size": model.spec.vocab_size}
    (path / "config.json").write_text(json.dumps(facts | {"eos_token_id": 3}), encoding="utf-8")
    return path


def write_all(root: Path) -> tuple[Path, dict[str, Path]]:
    """The checkpoint, and a directory for each of the STYLES."""
    checkpoint = write_checkpoint(root / "checkpoint", CONFIG)
    return checkpoint, {name: write(root / name, checkpoint, **how) for name, how in STYLES.items()}
