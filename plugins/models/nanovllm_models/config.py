"""config.json as a family reads it: typed values, and nothing left unread that could matter.

The rule for keys. A family reads by name every key that it implements. Of the others,
- a key in IRRELEVANT says nothing about the forward pass and is ignored (so is one that is null);
- a key that is false, 0 or empty asks for nothing and is ignored;
- any other key might change the mathematics: it is refused by name, never guessed at.

This file knows no family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.errors import ModelError, UnsupportedModelError

MAX_INT = 2**31 - 1
MAX_LAYERS = 10_000
MIN_NUMBER, MAX_NUMBER = 1e-30, 1e15  # far beyond any real value, far inside float64

# Training, bookkeeping and generation defaults (which old files of transformers wrote out in full).
IRRELEVANT = frozenset(
    """
    _attn_implementation _name_or_path architectures bos_token_id dtype embd_pdrop eos_token_id finetuned
    finetuning_task id2label initializer_range keys_to_ignore_at_inference label2id model_type name_or_path
    pad_token_id pretraining_tp problem_type resid_pdrop sep_token_id task_specific_params tokenizer_class
    torch_dtype torchscript transformers_version unsloth_fixed unsloth_version use_cache
    attention_dropout attn_pdrop hidden_dropout classifier_dropout embedding_dropout residual_dropout
    output_router_logits router_aux_loss_coef router_jitter_noise cache_implementation
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()
)


class Config:
    """Typed access to one JSON object; remembers what was read."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where  # "config.json of DIR", for messages
        self._values = values
        self._read: set[str] = set()

    @property
    def read(self) -> frozenset[str]:
        """The keys that were asked for so far."""
        return frozenset(self._read)

    def get(self, key: str) -> Any:
        """The value as it stands, or None if absent or null."""
        self._read.add(key)
        return self._values.get(key)

    def __contains__(self, key: str) -> bool:
        """Is the key there, null included? For keys whose absence and whose null mean different things."""
        return key in self._values

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INT) -> int:
        """A whole number. Without a default the key is required."""
        value = self.get(key)
        if value is None:
            value = default
        if type(value) is not int or not low <= value <= high:
            raise self._bad(key, f"a whole number from {low} to {high}", value)
        return value

    def number(self, key: str, default: float | None = None, *, low: float = MIN_NUMBER) -> float:
        """A positive number. Without a default the key is required."""
        value = self.get(key)
        if value is None:
            value = default
        if type(value) not in (int, float) or not low <= value <= MAX_NUMBER:
            raise self._bad(key, f"a number from {low:g} to {MAX_NUMBER:g}", value)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._bad(key, "true or false", value)
        return value

    def choice(self, key: str, allowed: Mapping[str, str], default: str) -> str:
        """`allowed` maps the file's words to ours."""
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in allowed:
            raise self.unsupported(key, value, f"supported: {', '.join(sorted(allowed))}")
        return allowed[value]

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` positive numbers. The key is required."""
        value = self.get(key)
        is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length
        if not is_list or not all(type(v) in (int, float) and MIN_NUMBER <= v <= MAX_NUMBER for v in value):
            raise self._bad(key, f"a list of {length} positive numbers", value)
        return tuple(float(v) for v in value)

    def section(self, key: str) -> Config | None:
        """The object under the key; None if absent, null or empty."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._bad(key, "an object", value)
        return Config(value, f"{key} in {self.where}") if value else None

    def finish(self) -> None:
        """Refuse what was not read and could change the mathematics."""
        for key, value in self._values.items():
            if key not in self._read and key not in IRRELEVANT and value:
                raise self.unsupported(
                    key, value, "if it changes nothing in the forward pass, delete the key from the file"
                )

    def contradiction(self, what: str) -> ModelError:
        """The error to raise where two values cannot both be right."""
        return ModelError(f"{self.where}: {what}", hint="correct or restore the file")

    def unsupported(self, key: str, value: object, remedy: str) -> UnsupportedModelError:
        """The error to raise for a value that is not implemented."""
        return UnsupportedModelError(f"{self.where}: {key} = {_show(value)} is not implemented", hint=remedy)

    def _bad(self, key: str, wanted: str, value: object) -> ModelError:
        found = "is missing" if value is None else f"is {_show(value)}"
        return ModelError(f"{self.where}: {key} {found}; it must be {wanted}", hint="correct or restore the file")


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int too long to print
        text = "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
