"""Model directories with random weights, of the shapes that the benchmarks use: config.json, weights, a tokenizer.

    python benchmarks/models.py                                     # list the shapes
    python benchmarks/models.py gpt2 DIRECTORY [--dtype bf16] [--seed 0] [--outliers 6]

Matrices are normal with variance 1 / inputs, so that every layer changes what the next token is and equal tokens
of two engines mean something; embeddings and biases have deviation 0.02, norms have gain 1. The tokenizer knows
single bytes and gives every other id a placeholder, so that any output can be turned into text.

`--outliers N` plants outlier channels, for judging quantisation. In large language models the activations that
enter the linear layers are many times larger in a few channels than in all others: up to 20 times, concentrated
in as few as 6 channels that are the same in every layer and for most tokens (T. Dettmers et al., LLM.int8(),
arXiv:2208.07339, section 4). Here N channels of the hidden state, drawn once, get their gain multiplied by 16 in
every norm in front of attention and feed-forward, and the weights that read them divided by 16. Both are exact in
binary floating point (bar subnormal numbers), so the model computes the same function as without outliers, and
whatever a quantised run loses beyond the plain model is the outliers' doing. What this does not imitate: that
real outliers mostly keep one sign, and that a few tokens have activations a thousand times larger.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STD = 0.02
OUTLIER_FACTOR = np.float32(16)

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    },
    "gpt2-tiny": {
        "model_type": "gpt2", "vocab_size": 512, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    },
    "qwen2-tiny": {
        "model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rope_theta": 10000.0,
    },
}  # fmt: skip
COMMON = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
}  # fmt: skip


class Weight(NamedTuple):
    name: str
    shape: tuple[int, ...]
    std: float | None  # of its normal distribution; None = all ones
    hidden: int | None = None  # the axis of a norm, or of a matrix that reads a norm's output, to plant outliers in


def gpt2(config: dict[str, Any]) -> Iterator[Weight]:
    """124 million parameters for `gpt2`. Matrices are (in, out)."""
    width = config["n_embd"]
    yield Weight("transformer.wte.weight", (config["vocab_size"], width), STD)
    yield Weight("transformer.wpe.weight", (config["n_positions"], width), STD)
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        for norm, reader, out, writer, into in (
            ("ln_1", "attn.c_attn", 3, "attn.c_proj", 1),
            ("ln_2", "mlp.c_fc", 4, "mlp.c_proj", 4),
        ):
            yield Weight(f"{layer}.{norm}.weight", (width,), None, 0)
            yield Weight(f"{layer}.{norm}.bias", (width,), STD, 0)
            yield Weight(f"{layer}.{reader}.weight", (width, out * width), width**-0.5, 0)
            yield Weight(f"{layer}.{reader}.bias", (out * width,), STD)
            yield Weight(f"{layer}.{writer}.weight", (into * width, width), (into * width) ** -0.5)
            yield Weight(f"{layer}.{writer}.bias", (width,), STD)
    yield Weight("transformer.ln_f.weight", (width,), None)
    yield Weight("transformer.ln_f.bias", (width,), STD)


def qwen2(config: dict[str, Any]) -> Iterator[Weight]:
    """494 million parameters for `qwen2-0.5b`. Matrices are (out, in)."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    yield Weight("model.embed_tokens.weight", (config["vocab_size"], width), STD)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield Weight(f"{layer}.input_layernorm.weight", (width,), None, 0)
        for name, size in (("q", width), ("k", kv), ("v", kv)):
            yield Weight(f"{layer}.self_attn.{name}_proj.weight", (size, width), width**-0.5, 1)
            yield Weight(f"{layer}.self_attn.{name}_proj.bias", (size,), STD)
        yield Weight(f"{layer}.self_attn.o_proj.weight", (width, width), width**-0.5)
        yield Weight(f"{layer}.post_attention_layernorm.weight", (width,), None, 0)
        yield Weight(f"{layer}.mlp.gate_proj.weight", (inner, width), width**-0.5, 1)
        yield Weight(f"{layer}.mlp.up_proj.weight", (inner, width), width**-0.5, 1)
        yield Weight(f"{layer}.mlp.down_proj.weight", (width, inner), inner**-0.5)
    yield Weight("model.norm.weight", (width,), None)


FAMILIES = {"gpt2": gpt2, "qwen2": qwen2}


def make(shape: str, directory: Path, *, dtype: str = "fp32", seed: int = 0, outliers: int = 0) -> Path:
    """Write the model; equal arguments give equal files. One tensor is in memory at a time."""
    config = COMMON[SHAPES[shape]["model_type"]] | SHAPES[shape]
    weights = list(FAMILIES[config["model_type"]](config))
    width = config.get("n_embd") or config["hidden_size"]
    if not 0 <= outliers <= width:
        raise SystemExit(f"--outliers must be between 0 and the model's width, {width}, not {outliers}")
    directory.mkdir(parents=True, exist_ok=True)
    eos = config["vocab_size"] - 1
    config |= {"bos_token_id": eos, "eos_token_id": eos, "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype]}
    _write_json(directory / "config.json", config)
    _write_json(directory / "tokenizer.json", tokenizer(config["vocab_size"]))
    # transformers, and what converts with its help, would add tokens of their own for those that are not named.
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|end|>")
    _write_json(directory / "tokenizer_config.json", special | {"tokenizer_class": "PreTrainedTokenizerFast"})

    rng = np.random.default_rng(seed)
    channels = np.random.default_rng([seed, 1]).choice(width, outliers, replace=False)  # leaves `rng` as it is
    size = {"fp32": 4, "bf16": 2}[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for weight in weights:
        begin, end = end, end + size * prod(weight.shape)
        header[weight.name] = {"dtype": {"fp32": "F32", "bf16": "BF16"}[dtype], "shape": weight.shape,
                               "data_offsets": [begin, end]}  # fmt: skip
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for weight in weights:
            if weight.std is None:
                values = np.ones(weight.shape, np.float32)
            else:
                values = rng.standard_normal(weight.shape, dtype=np.float32) * np.float32(weight.std)
            if weight.hidden is not None and outliers:
                is_norm = len(weight.shape) == 1  # its gain, and its bias with it
                at = channels if weight.hidden == 0 else (slice(None), channels)
                values[at] *= OUTLIER_FACTOR if is_norm else 1 / OUTLIER_FACTOR
            file.write((values if dtype == "fp32" else to_bf16(values)).tobytes())
    return directory


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded to nearest, ties to even; finite values only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """A byte-level tokenizer.json without merges: 256 bytes, placeholders, and <|end|> as the last id."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's bytes_to_unicode
    others = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    names = [*alphabet, *(f"<unused{i}>" for i in range(len(alphabet), vocab_size - 1))]
    end = {"id": vocab_size - 1, "content": "<|end|>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | flags],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {name: i for i, name in enumerate([*names, "<|end|>"])}, "merges": [],
        },
    }  # fmt: skip


def num_parameters(shape: str) -> int:
    config = SHAPES[shape]
    return sum(prod(weight.shape) for weight in FAMILIES[config["model_type"]](config))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES)
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outliers", type=int, default=0, metavar="N", help="channels; large models have about 6")
    args = parser.parse_args()
    if args.shape is None:
        for shape in SHAPES:
            print(f"{shape:12} {num_parameters(shape):>12,} parameters")
        return
    if args.directory is None:
        parser.error("give the DIRECTORY to write to")
    make(args.shape, args.directory, dtype=args.dtype, seed=args.seed, outliers=args.outliers)
    print(f"{args.directory}: {args.shape}, {num_parameters(args.shape):,} parameters, {args.dtype}")


if __name__ == "__main__":
    main()
