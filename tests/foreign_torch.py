"""Tiny decoders as people write them in torch, and as files: TorchScript (scripted or traced) and torch.export.

One decoder with rotary positions and grouped heads; around it every signature that is understood. Its own `alone`
is the oracle: the whole context each time, one sequence, in plain torch. A `fault` is a way in which a model may
differ from what its signature promises.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Dict, List, Optional, Tuple  # noqa: UP035 (TorchScript reads these)

import pytest

torch = pytest.importorskip("torch", reason="the runtime: pip install 'nanovllm[torch]'")

from torch import Tensor, nn  # noqa: E402

import torch_support  # noqa: E402
from nanovllm_runner_torch.archive import torch_jit_warns_of_its_age  # noqa: E402
from nanovllm_runner_torch.options import TorchOptions  # noqa: E402

VOCAB, HIDDEN, HEADS, KV_HEADS, SIZE, LAYERS = 125, 32, 4, 2, 8, 2
BAD_TOKEN = 60  # of the faults that are one token's
MAX_LEN = 96
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": MAX_LEN,
    "eos_token_id": 3,
}
Pair = Tuple[Tensor, Tensor]  # noqa: UP006


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = HEADS, KV_HEADS, SIZE  # TorchScript sees no globals
        self.q = nn.Linear(HIDDEN, HEADS * SIZE)
        self.k = nn.Linear(HIDDEN, KV_HEADS * SIZE)
        self.v = nn.Linear(HIDDEN, KV_HEADS * SIZE)
        self.out = nn.Linear(HEADS * SIZE, HIDDEN)
        self.norm, self.mlp_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, past: Pair) -> Tuple[Tensor, Pair]:  # noqa: UP006
        batch, new = x.shape[0], x.shape[1]
        h = self.norm(x)
        q = self.q(h).view(batch, new, self.heads, self.size).transpose(1, 2)
        k = self.k(h).view(batch, new, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(h).view(batch, new, self.kv_heads, self.size).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        group = self.heads // self.kv_heads
        keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = (q @ keys.transpose(2, 3)) / self.size**0.5 + bias
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).reshape(batch, new, self.heads * self.size)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.silu(self.up(self.mlp_norm(x)))), (k, v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Decoder(nn.Module):
    def __init__(self, fault: str = "", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fault = fault
        self.kv_heads, self.size, self.num_layers = KV_HEADS, SIZE, LAYERS  # TorchScript sees no globals
        self.bad_token = BAD_TOKEN
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.register_buffer("rates", 100.0 ** -(torch.arange(SIZE // 2) / (SIZE // 2)))
        with torch.no_grad():
            self.head.weight *= 8  # so that rounding decides no token
            self.head.bias[BAD_TOKEN] = -100  # is never drawn
            if fault == "NaN":
                self.head.bias.fill_(torch.nan)
            if fault == "NaN of a token":
                self.embed.weight[BAD_TOKEN] = torch.nan

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: List[Pair]) -> Tuple[Tensor, List[Pair]]:  # noqa: UP006
        """ids, positions (B, S), mask (B, P + S) bool -> logits (B, S, vocab), presents."""
        if self.fault == "raises at a token" and bool((ids == self.bad_token).any()):
            raise ValueError("on purpose")
        old, new = past[0][0].shape[2], ids.shape[1]
        seen = torch.arange(old + new, device=ids.device) <= old + torch.arange(new, device=ids.device)[:, None]
        if self.fault != "mask ignored":
            seen = seen[None] & mask[:, None]  # (B, S, P + S)
        bias = torch.zeros_like(seen, dtype=self.rates.dtype).masked_fill(~seen, -1e4)
        bias = bias.reshape(-1, 1, new, old + new)
        angles = positions[:, None, :, None].to(self.rates.dtype) * self.rates  # (B, 1, S, size / 2)
        x = self.embed(ids)
        presents: List[Pair] = []  # noqa: UP006
        for i, layer in enumerate(self.layers):
            x, present = layer(x, angles.cos(), angles.sin(), bias, past[i])
            presents.append(present)
        if self.fault == "rows coupled":
            x = x + 0.05 * x.mean(0, keepdim=True)
        return self.head(self.norm(x)), presents

    @torch.jit.export
    def fresh(self, ids: Tensor) -> List[Pair]:  # noqa: UP006
        """A past of none."""
        nothing = torch.zeros([ids.shape[0], self.kv_heads, 0, self.size], dtype=self.rates.dtype, device=ids.device)
        return [(nothing, nothing) for _ in range(self.num_layers)]

    @torch.jit.ignore
    def alone(self, tokens: list[int]) -> Tensor:
        """(length, vocab): the oracle."""
        ids = torch.tensor([tokens], device=self.rates.device)
        with torch.no_grad():
            return self(ids, torch.ones_like(ids).bool(), torch.arange(ids.shape[1])[None], self.fresh(ids))[0][0]

    @torch.jit.ignore
    def greedy(self, tokens: list[int], count: int) -> list[int]:
        for _ in range(count):
            tokens = [*tokens, int(self.alone(tokens)[-1].argmax())]
        return tokens[-count:]


class Signature(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder


class IdsOnly(Signature):
    """The seeds' plain signature; padding on the right is behind every token."""

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand_as(input_ids)
        return self.decoder(input_ids, input_ids >= 0, positions, self.decoder.fresh(input_ids))[0]


class Masked(Signature):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Dict[str, Tensor]:  # noqa: UP006
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        fresh = self.decoder.fresh(input_ids)
        return {"logits": self.decoder(input_ids, attention_mask != 0, positions, fresh)[0]}


class LastLogits(Signature):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tuple[Tensor]:  # noqa: UP006
        fresh = self.decoder.fresh(input_ids)
        return (self.decoder(input_ids, attention_mask != 0, position_ids, fresh)[0][:, -1],)


class Flat(Signature):
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_0_key: Tensor,
        past_0_value: Tensor,
        past_1_key: Tensor,
        past_1_value: Tensor,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
        past = [(past_0_key, past_0_value), (past_1_key, past_1_value)]
        logits, presents = self.decoder(input_ids, attention_mask != 0, position_ids, past)
        return logits, presents[0][0], presents[0][1], presents[1][0], presents[1][1]


class Pairs(Signature):
    """A mask that must be bool, and tokens before heads in the past."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: List[Pair],  # noqa: UP006
        use_cache: bool = True,
    ) -> Tuple[Tensor, List[Pair]]:  # noqa: UP006
        past = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in past_key_values]
        logits, presents = self.decoder(input_ids, ~(~attention_mask), position_ids, past)
        return logits, [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in presents]


class OptionalPairs(Signature):
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,  # noqa: UP045
        past: Optional[List[Pair]] = None,  # noqa: UP006, UP045
    ) -> Tuple[Tensor, List[Pair]]:  # noqa: UP006
        known = self.decoder.fresh(input_ids) if past is None else past
        if attention_mask is None:
            attention_mask = torch.ones(
                [input_ids.shape[0], known[0][0].shape[2] + input_ids.shape[1]], dtype=torch.int64
            )
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return self.decoder(input_ids, attention_mask != 0, positions, known)


class NestedTuple(Signature):
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Tuple[Pair, Pair],  # noqa: UP006
    ) -> Tuple[Tensor, Tuple[Pair, Pair]]:  # noqa: UP006
        past = [past_key_values[0], past_key_values[1]]
        logits, presents = self.decoder(input_ids, attention_mask != 0, position_ids, past)
        return logits, (presents[0], presents[1])


class DictOfPresents(Signature):
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: List[Pair],  # noqa: UP006
    ) -> Dict[str, Tensor]:  # noqa: UP006
        logits, presents = self.decoder(input_ids, attention_mask != 0, position_ids, past)
        found = {"logits": logits}
        for i, (k, v) in enumerate(presents):
            found[f"present.{i}.key"], found[f"present.{i}.value"] = k, v
        return found


def example(signature: type[Signature]) -> tuple:
    """Two rows of three tokens, on a past of four where there is one."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    pairs = [(torch.randn(2, KV_HEADS, 4, SIZE), torch.randn(2, KV_HEADS, 4, SIZE)) for _ in range(LAYERS)]
    if signature is IdsOnly:
        return (ids,)
    if signature in (Masked, LastLogits):
        return (ids, torch.ones(2, 3).long(), torch.arange(3).expand(2, 3))[: 2 if signature is Masked else 3]
    first = (ids, torch.ones(2, 7).long(), torch.arange(4, 7).expand(2, 3))
    if signature is Flat:
        return (*first, *(x for pair in pairs for x in pair))
    if signature is Pairs:
        pairs = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in pairs]
        return (first[0], first[1].bool(), first[2], pairs)
    if signature is OptionalPairs:
        return (*first[:2], pairs)
    return (*first, tuple(pairs) if signature is NestedTuple else pairs)


def write(path: Path, signature: type[Signature], how: str, decoder: Decoder, config: dict | None = CONFIG) -> Path:
    """A directory of model.pt or model.pt2, and config.json. `how`: script, trace or export."""
    model, args = signature(copy.deepcopy(decoder)).eval(), example(signature)
    path.mkdir(parents=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if how == "export":
        dynamic = torch.utils._pytree.tree_map(lambda t: time_axes(signature, t), args)
        torch.export.save(torch.export.export(model, args, dynamic_shapes=dynamic), path / "model.pt2")
        return path
    with torch_jit_warns_of_its_age(), warnings.catch_warnings():
        if how == "trace":
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            archive = torch.jit.trace(model, args, strict=False, check_trace=False)
        else:
            archive = torch.jit.script(model)
        torch.jit.save(archive, path / "model.pt")
    return path


def time_axes(signature: type[Signature], tensor: Tensor) -> dict:
    time = 1 if tensor.ndim == 2 or signature is Pairs else 2
    return {0: torch.export.Dim.DYNAMIC, time: torch.export.Dim.DYNAMIC}


# Signatures, in several ways in which they are written.
STYLES = {
    "ids-only-script": (IdsOnly, "script"),
    "ids-only-trace": (IdsOnly, "trace"),
    "ids-only-export": (IdsOnly, "export"),
    "masked-trace": (Masked, "trace"),
    "last-logits-script": (LastLogits, "script"),
    "flat-script": (Flat, "script"),
    "flat-trace": (Flat, "trace"),
    "flat-export": (Flat, "export"),
    "pairs-script": (Pairs, "script"),
    "pairs-export": (Pairs, "export"),
    "optional-script": (OptionalPairs, "script"),
    "tuple-trace": (NestedTuple, "trace"),
    "dict-script": (DictOfPresents, "script"),
    "dict-export": (DictOfPresents, "export"),
}


def make_runner(path: Path, *, dtype: str = "auto", **overrides):
    options = TorchOptions(device="cpu", dtype=dtype, allow_code_in=(path,))
    return torch_support.make_runner(path, **({"options": options, "num_blocks": None, "block_size": 16} | overrides))
