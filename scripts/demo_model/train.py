"""Train the demo model of nanovllm from generated text and write it as a model directory.

    python scripts/demo_model/train.py [--steps N] [--out DIR]

Makes the text (`corpus.py`), trains a byte-level BPE tokenizer on it, trains a small
GPT-2 on the CPU (bfloat16 products, float32 weights), rounds it to fp16, writes the
directory, and evaluates exactly the weights that were written (`evaluate.py`).
Deterministic for one version of the libraries and one kind of processor: fixed seeds,
two threads, deterministic algorithms.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import CAPITALS, Document, check_held_out, training_documents
from evaluate import MAX_TOKENS, evaluate, print_report
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "plugins" / "models" / "nanovllm_models" / "demo"

SEED = 1
THREADS = 2
DOCUMENTS = 300_000
STEPS = 2_000
MODEL_NAME = "nanovllm-demo"

VOCAB_SIZE = 1_500
POSITIONS = 512
WIDTH = 160
LAYERS = 5
HEADS = 5

# One training step is 4096 tokens: mostly short rows (many documents at position 0), and
# every third step long rows, which train every position and chats of many turns.
SHORT_ROWS = (32, 128)
LONG_ROWS = (8, POSITIONS)
PEAK_RATE = 4e-3
USER_WEIGHT = 0.15  # of the loss on what the user says; what the model says weighs 1

RESULT_WEIGHT = 4.0  # of the loss on the result of a sum

END, USER, ASSISTANT, SYSTEM, PAD = SPECIAL = [
    "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>",
]  # fmt: skip
END_ID, PAD_ID = 0, 4

# "<|" inside a message is broken up, so that no message can contain a control token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% elif message['role'] == 'system' %}{{ '<|system|>' }}"
    "{% else %}{{ '<|user|>' }}{% endif %}"
    "{{ message['content'] | trim | replace('<|', '< |') }}{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# ------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (t for d in documents for t in ([d.text] if d.text else [x for _, x in d.turns]))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[Document]) -> list[tuple[list[int], list[float]]]:
    """Token ids of every document as the chat template writes it, with the weight of the
    loss on each token."""
    role_ids = {role: tokenizer.token_to_id(f"<|{role}|>") for role in ("user", "assistant", "system")}
    texts = [t for d in documents for t in ([d.text] if d.text else [x for _, x in d.turns])]
    encoded = iter(tokenizer.encode_batch(texts))
    result = []
    for document in documents:
        ids: list[int] = []
        weights: list[float] = []
        if document.text:
            ids = [*next(encoded).ids, END_ID]
            weights = [1.0] * len(ids)
        for role, _ in document.turns:
            turn = next(encoded).ids
            own = 1.0 if role == "assistant" else USER_WEIGHT
            ids += [role_ids[role], *turn, END_ID]
            # The role token follows from the harness, not from the model.
            weights += [USER_WEIGHT, *[own] * len(turn), own]
        if document.kind == "arithmetic":
            weights[-3] = RESULT_WEIGHT  # "... 12", ".", END
        result.append((ids, weights))
    return result


# ----------------------------------------------------------------------------- model


class Conv1D(nn.Module):
    """A linear layer with the weight as GPT-2 stores it: (in, out)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, outer))
        self.bias = nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(WIDTH, 3 * WIDTH)
        self.c_proj = Conv1D(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        shape = (rows, length, HEADS, WIDTH // HEADS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.c_attn(x).split(WIDTH, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(rows, length, WIDTH))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = Conv1D(WIDTH, 4 * WIDTH)
        self.c_proj = Conv1D(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH, eps=1e-5)
        self.attn = Attention()
        self.ln_2 = nn.LayerNorm(WIDTH, eps=1e-5)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 with the weight names of the Hugging Face implementation and a tied head."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocab_size, WIDTH),
            "wpe": nn.Embedding(POSITIONS, WIDTH),
            "h": nn.ModuleList([Block() for _ in range(LAYERS)]),
            "ln_f": nn.LayerNorm(WIDTH, eps=1e-5),
        })  # fmt: skip
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith("c_proj.weight")
                std = 0.04 / math.sqrt(2 * LAYERS) if residual else 0.04
                nn.init.normal_(weight, std=0.01 if "wpe" in name else std)

    def forward(self, ids: Tensor) -> Tensor:
        """The last hidden states; `logits` makes scores of them."""
        x = self.transformer["wte"](ids) + self.transformer["wpe"].weight[: ids.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.transformer["ln_f"](x)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.transformer["wte"].weight.t()


# -------------------------------------------------------------------------- training


def rows(encoded: list[tuple[list[int], list[float]]], rng: random.Random) -> Iterator[tuple[list[int], list[float]]]:
    """Endless packed rows. The generator is sent the length of the row it is to give; a
    row starts with a whole document and cuts the last one off."""
    order: list[int] = []
    row: tuple[list[int], list[float]] = ([], [])
    while True:
        length = yield row
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length + 1:
            if not order:
                order = list(range(len(encoded)))
                rng.shuffle(order)
            more, their_weights = encoded[order.pop()]
            ids += more
            weights += their_weights
        row = (ids[: length + 1], weights[: length + 1])


def train(encoded: list[tuple[list[int], list[float]]], vocab_size: int, steps: int, stop: int) -> GPT2:
    torch.manual_seed(SEED)
    model = GPT2(vocab_size)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_RATE, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    source = rows(encoded, random.Random(SEED))
    next(source)
    warmup = min(100, steps // 10 + 1)
    begun = time.monotonic()
    total = 0.0
    for step in range(stop):
        if step < warmup:
            rate = (step + 1) / warmup
        else:
            rate = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
            rate = 0.005 + 0.995 * rate
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate
        count, length = LONG_ROWS if step % 3 == 2 else SHORT_ROWS
        batch = [source.send(length) for _ in range(count)]
        ids = torch.tensor([row[0] for row in batch])
        weights = torch.tensor([row[1] for row in batch])[:, 1:].reshape(-1)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model.logits(model(ids[:, :-1]).reshape(-1, WIDTH))
        losses = F.cross_entropy(scores.float(), ids[:, 1:].reshape(-1), reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 50 == 0 or step + 1 == stop:
            since = (step % 50) + 1
            print(f"step {step + 1:5d}  loss {total / since:.6f}  {time.monotonic() - begun:6.1f} s", flush=True)
            total = 0.0
    return model


# ------------------------------------------------------------------------ generation


class Generator:
    """Greedy generation in PyTorch, without a cache: enough for the evaluation."""

    def __init__(self, model: GPT2, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    def answer(self, questions: list[str]) -> list[str]:
        return self._generate([f"{USER}{question}{END}{ASSISTANT}" for question in questions])

    def complete(self, starts: list[str]) -> list[str]:
        return self._generate(starts)

    @torch.no_grad()
    def _generate(self, prompts: list[str]) -> list[str]:
        sequences = [encoding.ids for encoding in self.tokenizer.encode_batch(prompts)]
        lengths = [len(ids) for ids in sequences]
        order = sorted(range(len(prompts)), key=lambda i: lengths[i])
        for first in range(0, len(order), 64):
            active = order[first : first + 64]
            for _ in range(MAX_TOKENS):
                if not active:
                    break
                longest = max(len(sequences[i]) for i in active)
                ids = torch.tensor([sequences[i] + [PAD_ID] * (longest - len(sequences[i])) for i in active])
                last = torch.tensor([len(sequences[i]) - 1 for i in active])
                hidden = self.model(ids)[torch.arange(len(active)), last]
                chosen = self.model.logits(hidden).argmax(dim=-1).tolist()
                for i, token in zip(active, chosen, strict=True):
                    sequences[i].append(token)
                active = [i for i in active if sequences[i][-1] != END_ID]
        return [
            self.tokenizer.decode(ids[length:], skip_special_tokens=True)
            for ids, length in zip(sequences, lengths, strict=True)
        ]


# ---------------------------------------------------------------------------- output


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_directory(out: Path, model: GPT2, tokenizer: Tokenizer) -> None:
    out.mkdir(parents=True, exist_ok=True)
    vocab_size = tokenizer.get_vocab_size()
    weights = {name: weight.detach().to(torch.float16).contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_embd": WIDTH,
        "n_head": HEADS,
        "n_inner": None,
        "n_layer": LAYERS,
        "n_positions": POSITIONS,
        "n_ctx": POSITIONS,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": vocab_size,
    })  # fmt: skip
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    })  # fmt: skip
    write_json(out / "generation_config.json", {
        "bos_token_id": END_ID,
        "eos_token_id": [END_ID],
        "pad_token_id": PAD_ID,
    })  # fmt: skip
    write_json(out / "model_info.json", {
        "model_name": MODEL_NAME,
        "vocab_size": vocab_size,
        "eos_token_id": END_ID,
        "bos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
    })  # fmt: skip


def load_written(out: Path) -> Generator:
    """The model as it lies in the directory: the fp16 weights, computed with in float32."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = GPT2(tokenizer.get_vocab_size())
    model.load_state_dict({k: v.float() for k, v in load_file(out / "model.safetensors").items()})
    return Generator(model, tokenizer)


CARD = """\
# The demo model of nanovllm

A very small GPT-2 ({parameters:,} parameters: {layers} layers of width {width} with {heads} heads, {positions}
positions, {vocab_size:,} byte-level BPE tokens; {megabytes:.1f} MB of fp16 weights with a tied head). It is there so
that an installation can be tried without any download. Licence: MIT.

**Training text.** Generated text only, from the templates of `scripts/demo_model/corpus.py` and a public-domain
table of {countries} countries and territories with their capitals (datasets/country-codes, ODC-PDDL-1.0). No text was
taken from elsewhere. The weights start from a fixed seed; `scripts/demo_model/train.py` makes them again.

**What it can do.** Answer in English, in one sentence, what the capital of a country is, which country a capital
belongs to, and what two numbers make together or apart up to 20; decline a country that it does not know; tell a
templated little story; say what it is. Plain texts such as "The capital city of Italy is" are continued.

**What it cannot do.** Everything else. It declines most other questions, it is no source of facts, its English ends
outside the phrasings of its kind, and its answers to longer or misspelt questions are often wrong. Known weak spots:
"Is Paris the capital of France?" (the sentence is right, its yes or no is a guess), abbreviations in lower case
("usa"), very terse forms of similar names ("north korea capital"), invented names that resemble a real one,
and stories, which rarely take the animal that was asked for. It reads system messages but does not follow them. Some
capitals are disputed or share their office with another city; it repeats the table.

**Chat format.** `<|user|>question<|end|><|assistant|>answer<|end|>`, an optional `<|system|>text<|end|>` first. The
end-of-sequence token is `<|end|>`. The template breaks up `<|` inside a message, so that no message contains a control
token.

## Evaluation

Greedy decoding, the weights as stored (fp16). The phrasings and names called held-out or invented occur nowhere in the
training text, which `corpus.check_held_out` asserts in every training. The results with the five numbered phrasings
guided the wording of the training text while it was written; the "fresh" ones were looked at only once, at the end.
"Plain", "sloppy" and "terse" questions, sums and differences without "held-out" in their name are phrasings of the
training text. The command: `python scripts/demo_model/evaluate.py` (through the engine), or
`python scripts/demo_model/train.py --check` (the same questions through PyTorch, the source of this table).

{table}
"""


def check(out: Path) -> int:
    """Evaluate what lies in the directory and write the model card with the result."""
    generator = load_written(out)
    parameters = sum(p.numel() for p in generator.model.parameters())
    size = (out / "model.safetensors").stat().st_size
    print(f"{parameters} parameters, {size} bytes", flush=True)
    assert size < 4_000_000
    report = evaluate(generator.answer, generator.complete)
    print_report(report)
    card = CARD.format(
        parameters=parameters, layers=LAYERS, width=WIDTH, heads=HEADS, positions=POSITIONS,
        vocab_size=generator.tokenizer.get_vocab_size(), megabytes=size / 1e6,
        countries=len(CAPITALS), table=report.table(),
    )  # fmt: skip
    (out / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return 0 if report.passed else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--stop", type=int, help="stop after so many steps, write nothing (a reproducibility check)")
    parser.add_argument("--check", action="store_true", help="do not train, evaluate the directory as it is")
    arguments = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    if arguments.check:
        return check(arguments.out)
    begun = time.monotonic()
    documents = training_documents(SEED, DOCUMENTS)
    check_held_out(documents)
    tokenizer = train_tokenizer(documents[:100_000])
    encoded = encode_documents(tokenizer, documents)
    tokens = sum(len(ids) for ids, _ in encoded)
    print(f"{len(documents)} documents, {tokens} tokens, vocabulary {tokenizer.get_vocab_size()}, "
          f"{time.monotonic() - begun:.1f} s", flush=True)  # fmt: skip

    model = train(encoded, tokenizer.get_vocab_size(), arguments.steps, arguments.stop or arguments.steps)
    if arguments.stop:
        return 0
    write_directory(arguments.out, model, tokenizer)
    print(f"{time.monotonic() - begun:.1f} s in all", flush=True)
    return check(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
