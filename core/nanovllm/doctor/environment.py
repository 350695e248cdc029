"""Variables that change what is loaded, or how many threads it takes. Knows only names.

None of them is needed here, but a machine may have them for a reason (a proxy, one's own GPU of several): only what
replaces a library that pip installed is a warning, and only that is told to go.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path

from .. import sources
from ..errors import without_secrets
from ..threads import available_threads
from .case import Case
from .finding import Finding

LIBRARY_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")
PRELOADS = ("LD_PRELOAD", "DYLD_INSERT_LIBRARIES")
# Where these lie on a library path, they may be loaded instead of those that pip installed.
LIBRARIES = re.compile(r"lib(onnxruntime|torch|cud|cublas|nv|gomp|omp|iomp|mkl|openblas|stdc\+\+|gcc_s|python)[\w.+-]*")
# Where these lie on PYTHONPATH, they are imported instead of those that pip installed.
MODULES = ("nanovllm", "numpy", "onnx", "onnxruntime", "pydantic", "tokenizers", "torch", "yaml")
THREADS = (
    "OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
OTHERS = {
    "CUDA_VISIBLE_DEVICES": "libraries see no other GPU",
    "OMP_PROC_BIND": "OpenMP's threads stay on their processors",
    "GOMP_CPU_AFFINITY": "OpenMP's threads stay on these processors",
    "KMP_AFFINITY": "OpenMP's threads stay on these processors",
    "ONEDNN_MAX_CPU_ISA": "torch's kernels use no newer instructions",
    "OPENBLAS_CORETYPE": "NumPy's kernels are those for this processor",
    "PYTHONHOME": "Python takes its own library from there",
    "HF_ENDPOINT": "`nanovllm pull` asks that hub",
    "HTTPS_PROXY": "`nanovllm pull` goes through it; the http runner does not",
}


def examine(case: Case, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    findings = [
        *_libraries(environ),
        *_modules(environ),
        *_threads(environ),
        *(
            Finding("note", f"{name}={without_secrets(environ[name])!r:.80}: {effect}")
            for name, effect in OTHERS.items()
            if name in environ
        ),
        *_configuration(environ),
    ]
    yield from findings or [Finding("ok", "no variable changes what is loaded or how many threads it takes")]


def _libraries(environ: Mapping[str, str]) -> Iterator[Finding]:
    for name in PRELOADS:
        if environ.get(name):
            yield Finding("note", f"{name} loads {environ[name]!r:.80} into every program")
    for name in LIBRARY_PATHS:
        for entry in environ[name].split(os.pathsep) if environ.get(name) else ():
            if not entry:
                text = f"{name} has an empty entry: libraries are loaded from wherever you are"
                yield Finding("warning", text, f"remove the empty entry from {name}")
                continue
            try:
                found = sorted(path.name for path in Path(entry).iterdir() if LIBRARIES.match(path.name))
            except OSError as e:
                yield Finding("note", f"{name} names {entry}, which cannot be read: {e.strerror}")
                continue
            if found:
                text = f"{name} brings {_listed(found)} of {entry} before those that pip installed"
                yield Finding("warning", text, f"remove {entry} from {name}")
            else:
                yield Finding("note", f"{name} names {entry}, with no library that is used here")


def _modules(environ: Mapping[str, str]) -> Iterator[Finding]:
    entries = [str(Path(entry).absolute()) for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if not entries:
        return
    others = [path for path in sys.path if str(Path(path).absolute()) not in entries]
    hidden = [name for name in MODULES if PathFinder.find_spec(name, entries) and PathFinder.find_spec(name, others)]
    if hidden:
        text = f"PYTHONPATH brings {_listed(hidden)} before what pip installed"
        yield Finding("warning", text, "unset PYTHONPATH")
    else:
        yield Finding("note", f"PYTHONPATH names {_listed(entries)}, and hides no module that is used here")


def _threads(environ: Mapping[str, str]) -> Iterator[Finding]:
    for name in THREADS:
        if name not in environ:
            continue
        text = f"{name}={environ[name]!r:.20}: threads of a library that is told nothing else"
        yield Finding("note", f"{text}; this process may use {available_threads()}")


def _configuration(environ: Mapping[str, str]) -> Iterator[Finding]:
    for key, value in sources.from_environment(environ).items():
        name = value.origin.rpartition(" ")[2]
        yield Finding("note", f"{name} sets {'.'.join(key)} of the configuration")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
