"""Run by test_onnx_exporters.py in an environment of its own: `CHECKPOINT OUTPUT.onnx`, through torch.onnx's dynamo.

Inputs and outputs are called as optimum calls them.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, DynamicCache


class Decoder(torch.nn.Module):
    """Flat tensors around a model that wants a cache object."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        )
        return out.logits, *(tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values))


def main(checkpoint: str, output: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, new, before = 2, 3, 4
    past = [torch.zeros(batch, heads, before, size) for _ in range(2 * config.num_hidden_layers)]
    ids = torch.zeros(batch, new, dtype=torch.int64)
    mask = torch.ones(batch, before + new, dtype=torch.int64)
    positions = torch.arange(before, before + new).expand(batch, new).contiguous()
    layers = [f"{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    varies = torch.export.Dim.AUTO
    torch.onnx.export(
        Decoder(model),
        (ids, mask, positions, *past),
        output,
        dynamo=True,
        opset_version=18,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in layers)],
        output_names=["logits", *(f"present.{name}" for name in layers)],
        dynamic_shapes=(*[{0: varies, 1: varies}] * 3, tuple({0: varies, 2: varies} for _ in past)),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
