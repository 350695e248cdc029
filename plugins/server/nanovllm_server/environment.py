"""What `serve` reads from the environment and from a `.env` file beside where it is started. Knows no option's meaning.

A `.env` file says what the environment would; the environment wins. Two of its names count only there, because shells
and hosts set them for other reasons: HOST (the machine's name) and WORKERS.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigError

# Other names that are understood, and the keys that they set.
ALIASES: Mapping[str, str] = {
    "GENAI_MODEL_DIR": "model",
    "GENAI_DEVICE": "runner.device",
    "GENAI_MAX_LENGTH": "scheduler.max_model_len",
    "HOST": "server.host",
    "PORT": "server.port",
}
FILE = Path(".env")  # beside where the process is started
_ONLY_IN_FILE = ("HOST", "WORKERS")


def read_environment(environ: Mapping[str, str], file: Path) -> dict[str, str]:
    """Both together. Raises ConfigError for a file that cannot be read, and for WORKERS other than 1."""
    from dotenv import dotenv_values

    try:
        in_file = {k: v for k, v in dotenv_values(file, interpolate=False).items() if v is not None}
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file} cannot be read: {e}") from None
    if in_file.get("WORKERS", "1") != "1":
        raise ConfigError(
            f"WORKERS={in_file['WORKERS']} ({file}): one process owns the model and serves all of its callers",
            hint="for more capacity run several servers behind a balancer: docs/server/deployment.md",
        )
    both = {**in_file, **{k: v for k, v in environ.items() if k not in _ONLY_IN_FILE}}
    both.pop("WORKERS", None)
    return both


def load_arguments() -> dict[str, Any]:
    """What `nanovllm.config.load` is to read instead of the environment alone. Raises as `read_environment`."""
    return {"environ": read_environment(os.environ, FILE), "environ_aliases": ALIASES}
