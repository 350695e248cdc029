"""S2-01: a directory of onnxruntime-genai behind the server, as the founding document starts it: from a `.env` file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import openai
import pytest
import requests

from app_support import serve_command
from support import DATA, needs_data

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

MODEL = DATA / "onnx" / "stories260k-optimum"  # with tokens that transformers recorded


def write_genai_directory(path: Path) -> None:
    """The recorded model under the file names and facts of onnxruntime-genai."""
    path.mkdir()
    shutil.copy(MODEL / "tokenizer.json", path)
    shutil.copy(MODEL / "model.onnx", path / "decoder.onnx")
    tokenizer = json.loads((MODEL / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": template}))
    sizes = {"head_size": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 5}
    model = {
        "type": "llama",
        "context_length": 300,
        "eos_token_id": 2,
        "decoder": {"filename": "decoder.onnx", **sizes},
    }
    (path / "genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 300}}))


@needs_data
def test_a_genai_directory_is_served_from_the_seeds_env_file(tmp_path: Path) -> None:
    case = json.loads((MODEL / "reference.json").read_text())["cases"][0]
    wanted = case["greedy_new_ids"][:12]
    write_genai_directory(tmp_path / "genai-model")
    (tmp_path / ".env").write_text("GENAI_MODEL_DIR=./genai-model\nGENAI_DEVICE=cpu\nGENAI_MAX_LENGTH=200\nPORT=0\n")
    with serve_command(tmp_path, "serve", "--runner=onnx", what="./genai-model (onnx) at ") as url:
        health = requests.get(f"{url}/healthz", timeout=20).json()
        assert (health["backend"], health["device"]) == ("onnx", "cpu")
        assert Path(health["model_dir"]).name == "genai-model"
        ask = {"messages": [{"role": "user", "content": "Once"}], "temperature": 0, "max_tokens": 5}
        assert requests.post(f"{url}/v1/chat", json=ask, timeout=20).json()["metrics"]["output_tokens"] == 5
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            [model] = client.models.list().data
            assert model.model_dump()["max_model_len"] == 200
            answer = client.completions.create(
                model=model.id, prompt=case["prompt"], max_tokens=len(wanted), temperature=0
            )
        ids = requests.post(f"{url}/v1/tokenize", json={"text": case["prompt"] + answer.choices[0].text}, timeout=20)
        assert ids.json()["token_ids"] == [*case["input_ids"], *wanted]
