"""nanovllm and the engines that are installed here, on the same weights and requests, in turns. Prints ratios.

    python benchmarks/peers/run.py --model DIRECTORY --workload FILE [--peers transformers,vllm] [--runs 5]
        [--set runner.threads=2] [--dtype bf16] [--path openvino=EXPORTED] [--json FILE] [--markdown FILE]

Without --peers all are taken; one that is not installed, or has no --path that it needs, is named as skipped.
`--dtype` is what the peers compute in; --runner and --set say what nanovllm does. Without --workload the requests
are drawn. Method and definitions: docs/benchmarking.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engines import OWN_FORMAT, PEERS, missing

from nanovllm.bench import show, tables
from nanovllm.bench.child import Contestant
from nanovllm.bench.compare import Comparison, compare
from nanovllm.bench.worker import own_engine
from nanovllm.bench.workload import Drawn, read
from nanovllm.config import load
from nanovllm.errors import NanoVLLMError


def contestants(
    model: Path, names: Sequence[str], dtype: str, paths: Mapping[str, str], runner: str, sets: Sequence[str]
) -> tuple[list[Contestant], dict[str, str]]:
    """nanovllm and every peer that can run, and why the others cannot."""
    config = load(overrides={"model": str(model), "runner": runner}, sets=sets, environ={}).config
    chosen, skipped = [own_engine("nanovllm", config)], {}
    for name in names:
        if (needs := missing(name)) is not None:
            skipped[name] = f"skipped: {needs} is not installed"
        elif name in OWN_FORMAT and name not in paths:
            skipped[name] = f"skipped: it has a model format of its own; give --path {name}=PATH"
        else:
            settings = {"model": paths.get(name, str(model)), "dtype": dtype}
            command = (sys.executable, str(Path(__file__).with_name("engines.py")), name)
            chosen.append(Contestant(name=name, command=command, settings=settings))
    return chosen, skipped


def ours_first(comparison: Comparison, skipped: Mapping[str, str]) -> Comparison:
    """Without the pairs of peers among themselves, and with what was skipped."""
    return replace(
        comparison,
        ratios=tuple(r for r in comparison.ratios if r.first == "nanovllm"),
        agreements=tuple(a for a in comparison.agreements if a.first == "nanovllm"),
        failures={**skipped, **comparison.failures},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--workload", type=Path)
    parser.add_argument("--peers", default=",".join(PEERS), help="%(default)s")
    parser.add_argument("--runner", default="numpy")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--path", dest="paths", action="append", default=[], metavar="PEER=PATH")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one answer may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    names = [name.strip() for name in args.peers.split(",")]
    paths = dict(path.partition("=")[::2] for path in args.paths)
    if unknown := [name for name in [*names, *paths] if name not in PEERS]:
        parser.error(f"no peer is called {unknown[0]!r}; there are {', '.join(PEERS)}")
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} holds no config.json; benchmarks/models.py makes a model")
    try:
        workload = read(args.workload) if args.workload else None
        chosen, skipped = contestants(args.model, names, args.dtype, paths, args.runner, args.sets)
        comparison = compare(
            chosen,
            Drawn().workload if workload is None else lambda vocab_size, max_len: workload,
            runs=args.runs,
            timeout=args.timeout,
            on_progress=lambda text: print(text, file=sys.stderr),
        )
    except NanoVLLMError as e:
        sys.exit(f"error: {e}")
    comparison = ours_first(comparison, skipped)
    heading, parts = show.circumstances(comparison), show.comparison_tables(comparison)
    print(tables.terminal(heading, parts))
    if args.json:
        args.json.write_text(json.dumps(comparison.to_json(), indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(tables.markdown(heading, parts), encoding="utf-8")


if __name__ == "__main__":
    main()
