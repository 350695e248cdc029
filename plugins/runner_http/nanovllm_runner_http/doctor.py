"""`examine`: the configured servers for `nanovllm doctor`: does each answer, what does it speak, which model has it?"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from nanovllm.doctor import Case, Finding
from nanovllm.errors import NanoVLLMError

from .options import HttpOptions, Timeouts
from .probe import probe
from .transport import Transport

PATIENCE = 10.0  # seconds; an idle server describes itself at once


def examine(case: Case) -> Iterator[Finding]:
    """A server that the runner starts itself is asked when the engine is loaded."""
    options = case.options("runner", "http", HttpOptions)
    yield Finding("ok", f"imported: requests {metadata.version('requests')}, urllib3 {metadata.version('urllib3')}")
    for url in () if options is None else options.addresses:
        transport = Transport(url, options.model_copy(update={"timeouts": Timeouts(read=PATIENCE), "retries": 0}))
        try:
            _, facts = probe(transport, options.dialect, model=options.model, patience=0)
        except NanoVLLMError as e:  # of several servers, the others go on
            yield Finding("error" if len(options.addresses) == 1 else "warning", e.message, e.hint)
            continue
        finally:
            transport.close()
        told = {
            "speaks": facts.dialect, "model": facts.model, "vocabulary": facts.vocab_size,
            "context": facts.max_model_len, "answers at a time": facts.num_slots,
        }  # fmt: skip
        yield Finding("ok", f"{url}: {', '.join(f'{key} {value}' for key, value in told.items() if value is not None)}")
