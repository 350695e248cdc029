"""What the pages say of serving, as it is written there: the README's command and client snippet, `make serve-demo`,
and the commands of docs/server/deployment.md."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from app_support import serve_command
from support import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
DEPLOYMENT = (REPO / "docs" / "server" / "deployment.md").read_text(encoding="utf-8")


def fenced(language: str, words: str) -> str:
    """The one block of the README that has them."""
    [block] = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if words in b]
    return block


@contextmanager
def serving(command: str, directory: Path) -> Iterator[str]:
    """The address at which `nanovllm serve ...` says it serves. Any free port: 8000 may be somebody's."""
    words = (*shlex.split(command)[1:], "--port=0")
    with serve_command(directory, *words, what="demo (numpy) at http://") as url:
        yield url


def readme_command() -> str:
    [command] = re.findall(r"^\$ (nanovllm serve.*)$", README, re.MULTILINE)
    return command


def make_command() -> str:
    """What `make serve-demo` runs when everything is installed."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "--no-print-directory", "--dry-run", "serve-demo"]
    printed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    return printed.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", [readme_command, make_command], ids=["readme", "make"])
def test_the_client_snippet_prints_what_the_readme_shows(command: Callable[[], str], tmp_path: Path) -> None:
    snippet = fenced("python", "from openai import OpenAI")
    shown = README[README.index(snippet) :].split("```")[2].removeprefix("text\n")
    assert "Paris" in shown
    with serving(command(), tmp_path) as url:
        snippet = snippet.replace("http://127.0.0.1:8000", url)
        assert url in snippet
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", snippet], capture_output=True, text=True, timeout=60
        )
    assert (done.returncode, done.stdout.strip()) == (0, shown.strip()), done.stderr


def container_command() -> str:
    """What the image starts."""
    lines = re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", DEPLOYMENT, re.MULTILINE)
    return shlex.join(word for line in lines for word in json.loads(line))


def unit_command() -> str:
    """What systemd starts, with what it puts in for its own variable."""
    [command] = re.findall(r"^ExecStart=(.*)$", DEPLOYMENT, re.MULTILINE)
    return command.replace("${CREDENTIALS_DIRECTORY}/keys", "/run/secrets/nanovllm-keys")


@pytest.mark.parametrize("command", [container_command, unit_command], ids=["container", "systemd"])
def test_the_commands_of_the_deployment_page_serve(command: Callable[[], str], tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("model: demo\nrunner: numpy\n")
    (tmp_path / "keys").write_text("a key of 16 letters or more".replace(" ", "-"))
    said = command().replace("/etc/nanovllm/server.yaml", "server.yaml").replace("/run/secrets/nanovllm-keys", "keys")
    [check] = [json.loads(line) for line in re.findall(r"^    CMD (.*)$", DEPLOYMENT, re.MULTILINE)]
    assert check[:2] == ["python", "-c"]
    with serving(said, tmp_path) as url:
        here = url.replace("0.0.0.0", "127.0.0.1")
        healthy = check[2].replace("http://127.0.0.1:8000", here)
        assert here in healthy
        subprocess.run([sys.executable, "-W", "error", "-c", healthy], timeout=60, check=True)
        assert requests.get(f"{here}/v1/models", timeout=20).status_code == 401
