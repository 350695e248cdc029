"""`genai_config.json`, which lies beside the graphs of onnxruntime-genai: read, and checked against the graph.

Used are the facts of the model: which graph, what its inputs and outputs are called, vocabulary, context, end
tokens, recommended sampling. Not used is what concerns the machine: session_options, provider_options,
run_options and engine. A directory must not choose the device, the threads or a library to load; the
configuration does. They and whatever is unknown are kept by name, for `nanovllm inspect` to show.

Models of several graphs (speech, vision, a pipeline) are refused by name. This file opens no graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelError, UnsupportedModelError
from nanovllm_models import Config
from nanovllm_models.files import read_json

from .onnx_file import Header, Value

FILE_NAME = "genai_config.json"
MAX_DEPTH = 6  # of objects in objects
# What the graph's inputs and outputs are called where the file does not say; %d is the number of a layer.
INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}
FACTS = frozenset(
    """
    model.type model.vocab_size model.context_length model.eos_token_id model.bos_token_id model.pad_token_id
    model.decoder.filename model.decoder.head_size model.decoder.hidden_size model.decoder.num_hidden_layers
    model.decoder.num_attention_heads model.decoder.num_key_value_heads
    model.decoder.inputs.input_ids model.decoder.inputs.attention_mask model.decoder.inputs.position_ids
    model.decoder.inputs.past_key_names model.decoder.inputs.past_value_names model.decoder.inputs.past_names
    model.decoder.inputs.past_sequence_length model.decoder.inputs.total_sequence_length
    model.decoder.outputs.logits model.decoder.outputs.present_key_names model.decoder.outputs.present_value_names
    model.decoder.outputs.present_names
    search.do_sample search.temperature search.top_k search.top_p search.min_p search.repetition_penalty
    """.split()
)
# What the configuration or a request decides; all below such a key too.
NOT_ITS_OWN = tuple(
    """
    engine model.decoder.session_options model.decoder.run_options model.decoder.sliding_window
    search.max_length search.min_length search.num_beams search.num_return_sequences search.early_stopping
    search.length_penalty search.diversity_penalty search.no_repeat_ngram_size search.past_present_share_buffer
    search.random_seed search.batch_size search.chunk_size
    """.split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenaiConfig:
    path: Path
    model_type: str  # phi3, llama, qwen2, ...; says nothing about the graph
    filename: str  # of the graph, from this file's directory
    vocab_size: int | None
    context_length: int | None  # tokens
    tokens: Mapping[str, Any]  # eos_token_id, bos_token_id, pad_token_id: a number, several, or None
    num_layers: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_size: int | None
    inputs: Mapping[str, str]  # the file's name -> the graph's name, with the defaults
    outputs: Mapping[str, str]
    search: Mapping[str, Any]
    ignored: tuple[str, ...]  # keys that the configuration decides: model.decoder.session_options.log_id
    unknown: tuple[str, ...]  # keys that mean nothing here

    @classmethod
    def read(cls, path: Path) -> GenaiConfig:
        """Raises ModelError naming file and key, UnsupportedModelError for a model of several graphs."""
        values = read_json(path)
        root = Config(values, str(path))
        model = _section(root, "model")
        decoder = _section(model, "decoder")
        for section, names in ((model, ("encoder", "embedding", "vision", "speech")), (decoder, ("pipeline",))):
            if several := [name for name in names if section.get(name)]:
                raise UnsupportedModelError(
                    f"{section.where}: {several[0]} belongs to a model of several graphs, which is not implemented",
                    hint="use a text model of one graph",
                )
        keys = list(_keys(values))
        ignored = [key for key in keys if any(f"{key}.".startswith(f"{section}.") for section in NOT_ITS_OWN)]
        return cls(
            path=path,
            model_type=_text(model, "type"),
            filename=_text(decoder, "filename"),
            vocab_size=_size(model, "vocab_size"),
            context_length=_size(model, "context_length"),
            # -1 is how some exporters write "none".
            tokens={
                k: None if (v := model.get(k)) == -1 else v for k in ("eos_token_id", "bos_token_id", "pad_token_id")
            },
            num_layers=_size(decoder, "num_hidden_layers"),
            num_heads=_size(decoder, "num_attention_heads"),
            num_kv_heads=_size(decoder, "num_key_value_heads"),
            head_size=_size(decoder, "head_size"),
            inputs=_names(decoder, "inputs", INPUTS),
            outputs=_names(decoder, "outputs", OUTPUTS),
            search=_object(root, "search"),
            ignored=tuple(ignored),
            unknown=tuple(key for key in keys if key not in FACTS and key not in ignored),
        )

    @property
    def names(self) -> dict[str, str]:
        """Of inputs and outputs: the file's name -> the graph's name."""
        return {**self.inputs, **self.outputs}

    def past(self, layer: int) -> list[str]:
        """What the graph calls the layer's past: key and value, or both in one."""
        return _of_layer(self.inputs, "past", layer)

    def present(self, layer: int) -> list[str]:
        return _of_layer(self.outputs, "present", layer)

    def check(self, header: Header) -> None:
        """Does the file describe this graph? Raises ModelError naming file, key and both values."""
        inputs, outputs = ({v.name: v for v in values} for values in (header.inputs, header.outputs))
        for key, name, values in (
            ("inputs.input_ids", self.inputs["input_ids"], inputs),
            ("outputs.logits", self.outputs["logits"], outputs),
        ):
            if name not in values:
                raise self._wrong(header, f"decoder.{key} is {name!r:.60}, but the graph has {', '.join(values):.200}")
        for layer in range(self.num_layers or 0):
            past, present = self.past(layer), self.present(layer)
            lacking = [n for n in past if n not in inputs] + [n for n in present if n not in outputs]
            if lacking:
                layers = f"decoder.num_hidden_layers is {self.num_layers}"
                raise self._wrong(header, f"{layers}, but the graph has no {lacking[0]!r:.60}")
            for name in past:
                self._check_shape(header, inputs[name])
        if self.num_layers is not None and (more := [n for n in self.past(self.num_layers) if n in inputs]):
            layers = f"decoder.num_hidden_layers is {self.num_layers}"
            raise self._wrong(header, f"{layers}, but the graph has {more[0]!r} too")
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            heads = f"decoder.num_attention_heads is {self.num_heads}"
            raise self._wrong(header, f"{heads}, no multiple of num_key_value_heads, {self.num_kv_heads}")

    def _check_shape(self, header: Header, past: Value) -> None:
        """(batch, kv heads, past, head size), after a 2 where key and value are in one."""
        if len(past.shape) != 4 + ("past_names" in self.inputs):
            return  # no rule here is about such a past
        for key, wanted, found in (
            ("num_key_value_heads", self.num_kv_heads, past.shape[-3]),
            ("head_size", self.head_size, past.shape[-1]),
        ):
            if wanted is not None and isinstance(found, int) and found != wanted:
                raise self._wrong(header, f"decoder.{key} is {wanted}, but {past.name!r} has shape {list(past.shape)}")

    def _wrong(self, header: Header, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}", hint=f"restore the file that came with {header.path.name}")


def _of_layer(names: Mapping[str, str], kind: str, layer: int) -> list[str]:
    keys = (f"{kind}_key_names", f"{kind}_value_names", f"{kind}_names")
    return [names[key].replace("%d", str(layer)) for key in keys if key in names]


def _keys(values: Mapping[str, Any], parents: tuple[str, ...] = ()) -> Iterator[str]:
    """The dotted keys of everything that is no object; objects that lie deeper than all that is known are one key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and len(parents) < MAX_DEPTH:
            yield from _keys(value, (*parents, key))
        else:
            yield ".".join((*parents, key))


def _section(parent: Config, key: str) -> Config:
    section = parent.section(key)
    if section is None:
        raise ModelError(f"{parent.where}: {key} is missing", hint="restore the file")
    return section


def _object(parent: Config, key: str) -> Mapping[str, Any]:
    return parent.get(key) if parent.section(key) is not None else {}


def _text(section: Config, key: str) -> str:
    value = section.get(key)
    if not isinstance(value, str) or not value:
        raise ModelError(
            f"{section.where}: {key} is {value!r:.60}; it must be a text", hint="correct or restore the file"
        )
    return value


def _size(section: Config, key: str) -> int | None:
    return None if section.get(key) is None else section.integer(key)


def _names(decoder: Config, key: str, defaults: Mapping[str, str]) -> dict[str, str]:
    section = _object(decoder, key)
    for name, value in section.items():
        per_layer = name.endswith("_names")
        if not isinstance(value, str) or value.count("%d") != per_layer or value.count("%") != per_layer:
            wanted = "a name with one %d, for the layer" if per_layer else "a name"
            raise ModelError(
                f"{decoder.where}: {key}.{name} is {value!r:.60}; it must be {wanted}",
                hint="correct or restore the file",
            )
    if "past_names" in section or "present_names" in section:  # key and value in one
        defaults = {name: value for name, value in defaults.items() if not name.endswith("_names")}
    return {**defaults, **section}
