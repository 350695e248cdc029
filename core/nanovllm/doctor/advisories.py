"""Versions with known faults that matter here: a table, looked up offline. Knows nothing newer than itself.

A row is here only if this project hands that code something from a stranger: a model's files, a template, a server's
answer, a request. Sources: the advisories of the CVE ids below, in the GitHub and PyPA advisory databases.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from .case import Case
from .finding import Finding

TABLE_DATE = "2026-11-20"  # when it was last compared with the databases


class Advisory(NamedTuple):
    distribution: str
    first_fixed: str  # version
    ids: str
    matters: str  # why, here


TABLE = (
    Advisory("h11", "0.16.0", "CVE-2025-43859", "a malformed chunk can smuggle a request past a proxy to `serve`"),
    Advisory("jinja2", "3.1.6", "CVE-2024-56326, CVE-2025-27516", "a model's chat template leaves the sandbox"),
    Advisory("onnx", "1.21.0", "CVE-2026-27489, CVE-2026-34445", "a graph reads files outside its directory"),
    Advisory("requests", "2.32.4", "CVE-2024-47081", "an address sends credentials of .netrc to another host"),
    Advisory("sentencepiece", "0.2.1", "CVE-2026-1260", "a model's tokenizer file overflows memory"),
    Advisory("starlette", "1.0.1", "CVE-2026-48710, CVE-2025-62727", "headers lead past checks, or stall `serve`"),
    Advisory("torch", "2.10.0", "CVE-2025-32434, CVE-2026-24747", "converting pickled weights runs their code"),
    Advisory("urllib3", "2.7.0", "CVE-2026-44431, CVE-2026-44432", "an answer takes all memory, or another's key"),
)  # fmt: skip


def examine(case: Case) -> Iterator[Finding]:
    from packaging.version import Version

    num_known = 0
    for advisory in TABLE:
        try:
            installed = metadata.version(advisory.distribution)
        except metadata.PackageNotFoundError:
            continue
        if Version(installed) < Version(advisory.first_fixed):
            num_known += 1
            yield Finding(
                "warning",
                f"{advisory.distribution} {installed} has {advisory.ids}: {advisory.matters}",
                f"pip install --upgrade '{advisory.distribution}>={advisory.first_fixed}'",
            )
    if not num_known:
        yield Finding("ok", f"no version installed here is in the table of {TABLE_DATE}")
