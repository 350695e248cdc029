"""`examine`: the BLAS under NumPy for `nanovllm doctor`: which one, and on how many threads it really multiplies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nanovllm.doctor import Case, Finding, keep_busy, tell_threads

from .blas import Blas

SIZE = 512  # of the matrices: a product takes some milliseconds


def examine(case: Case) -> Iterator[Finding]:
    blas = Blas()
    yield Finding("ok", f"NumPy {np.__version__}, BLAS {blas.name}")
    wanted = (case.loaded is not None and case.loaded.config.runner.threads) or blas.threads
    a = np.ones((SIZE, SIZE), np.float32)
    with blas.limit(wanted):
        yield tell_threads("matrix products", keep_busy(lambda: a @ a), wanted)
