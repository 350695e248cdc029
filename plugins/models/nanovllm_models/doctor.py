"""`examine`: the configured model's files for `nanovllm doctor`, or the embedded one's, as `inspect` sees them."""

from __future__ import annotations

from collections.abc import Iterator

from nanovllm.doctor import Case, Finding
from nanovllm.plugins import resolve_model

from .inspect_model import inspect_model


def examine(case: Case) -> Iterator[Finding]:
    name, path = resolve_model("demo" if case.loaded is None else case.loaded.config.model)
    if path is None:
        yield Finding("note", f"{name} is no file or directory, so there is nothing to look at here")
        return
    report = inspect_model(path)
    if report.is_usable:
        what = report.architecture.architecture if report.architecture else report.program or "an ONNX graph"
        yield Finding("ok", f"{name}: {what}, {sum(file.size for file in report.files) / 1e6:,.1f} MB of files")
    yield from report.findings
