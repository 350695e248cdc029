"""The server that the engine starts: found, started, waited for, started again, and never left behind.

Real child processes: tests/fake_program.py takes the part of llama-server.
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine_support import Answers, ask, drive, greedy
from faulty_server import NUM_TOKENS, TOKENIZER, context_of
from http_support import nothing_left
from nanovllm.builtin.mock import expected
from nanovllm.engine import Engine
from nanovllm.errors import ConfigError, EngineDead, RunnerDead, RunnerError
from nanovllm.progress import Waiting
from nanovllm_runner_http import keeper
from nanovllm_runner_http.create import create_runner
from nanovllm_runner_http.options import HttpOptions
from nanovllm_runner_http.process import ServerProcess, server_command

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and at process groups")

PROGRAM = Path(__file__).with_name("fake_program.py")
MODEL = Path(__file__).with_name("faulty_server.py")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    """Make a process of the fake program with these flags; all are closed at the end."""
    made: list[ServerProcess] = []

    def make(*flags: str, command: tuple[str, ...] = (sys.executable, str(PROGRAM)), **options: Any) -> ServerProcess:
        made.append(ServerProcess([*command, *flags], answers, **options))
        return made[-1]

    yield make
    for process in made:
        process.close()


def is_alive(pid: int) -> bool:
    """Does the process run? One that has ended and that nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def pids_in(file: Path, num_lines: int = 1) -> list[int]:
    until(lambda: file.exists() and file.read_text().count("\n") >= num_lines, "the server says its pids")
    return [int(pid) for pid in file.read_text().split()]


def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail(f"waited in vain: {what}")


# ------------------------------------------------------------------------------------ start and stop


def test_it_is_ready_when_start_returns_and_gone_when_close_does(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    process = start("--load", "0.2", "--pids", str(pids), "-m", "a model; $(echo no shell).gguf")
    url = process.start()
    assert answers(url)
    assert process.is_running
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert b'"a model; $(echo no shell).gguf"' in answer.read(), "an argument stays one argument"
    process.close()
    monkeypatch.setattr(os, "killpg", lambda *group: pytest.fail("by now it may be the group of somebody else"))
    process.close()
    assert not answers(url)
    assert not process.is_running
    assert not any(is_alive(pid) for pid in pids_in(pids)), "the server or its child is left"


@pytest.fixture
def hasty_keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not wait for seconds until it kills."""
    hasty = tmp_path / "keeper.py"
    hasty.write_text(Path(keeper.__file__).read_text().replace("GRACE = 5.0", "GRACE = 0.2"))
    monkeypatch.setattr(keeper, "__file__", str(hasty))


@linux
def test_one_that_ignores_sigterm_is_killed(start: Any, tmp_path: Path, hasty_keeper: None) -> None:
    process = start("--stubborn", "--pids", str(tmp_path / "pids"))
    process.start()
    process.close()
    assert not any(is_alive(pid) for pid in pids_in(tmp_path / "pids"))


def test_one_that_ends_at_once_shows_what_it_said(start: Any) -> None:
    lines = [f"line {i}" for i in range(60)] + ["\x1b[31mno such model\x1b[0m\u202e"]
    process = start("--die", "3", *(word for line in lines for word in ("--say", line)))
    with pytest.raises(RunnerError) as caught:
        process.start()
    text = str(caught.value)
    assert text.startswith(f"{Path(sys.executable).name} ended with status 3 before it was ready; its last lines:\n")
    assert text.splitlines()[-1].strip() == "[31mno such model [0m", "the last line, without what a terminal would obey"
    assert "line 59" in text
    assert "line 52" not in text, "all of it"
    assert not process.is_running


def test_one_that_is_never_ready(start: Any) -> None:
    process = start("--load", "600", "--say", "loading tensors", start_timeout=0.5)
    with pytest.raises(
        RunnerError, match=r"not ready after 0\.5 s \(runner\.startup_timeout\); its last lines:\n.*loading"
    ):
        process.start()
    assert not process.is_running


def test_close_interrupts_the_wait(start: Any) -> None:
    process = start("--load", "600")
    errors: list[Exception] = []

    def run() -> None:
        try:
            process.start()
        except RunnerError as e:
            errors.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: process.is_running, "it starts")
    process.close()
    thread.join()
    assert "was closed before it was ready" in str(errors[0])
    assert not process.is_running
    with pytest.raises(RunnerError, match="was closed"):
        process.revive()


def test_a_port_that_somebody_else_took_first(start: Any, tmp_path: Path) -> None:
    process = start("--taken", str(tmp_path / "holder"))
    try:
        url = process.start()
        assert answers(url)
    finally:
        os.kill(int((tmp_path / "holder").read_text()), signal.SIGTERM)


# --------------------------------------------------------------------------------------- the program


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no program 'no-such-server' on PATH; install it"):
        ServerProcess(["no-such-server"], answers)
    (tmp_path / "model.llamafile").write_bytes(b"MZqFpD")
    with pytest.raises(ConfigError, match="chmod \\+x"):
        ServerProcess([str(tmp_path / "model.llamafile")], answers)


def test_the_command_of_a_llamafile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = HttpOptions(llamafile="./m.llamafile", args=["-c", "2048"])
    assert server_command(options) == [str(tmp_path / "m.llamafile"), "--server", "-c", "2048"]
    options = HttpOptions(command=["llama-server", "-m", "m.gguf"])
    assert server_command(options) == ["llama-server", "-m", "m.gguf"]


@linux
def test_a_llamafile_is_started_where_the_kernel_does_not_know_the_format(start: Any, tmp_path: Path) -> None:
    """No #! line: the kernel says ENOEXEC, as it does for every llamafile without a binfmt entry."""
    llamafile = tmp_path / "a model.llamafile"
    llamafile.write_bytes(
        b"MZqFpD='\n\x00\xff\n' 2>/dev/null\n" + f'exec "{sys.executable}" "{PROGRAM}" "$@"\n'.encode()
    )
    llamafile.chmod(0o755)
    with pytest.raises(OSError, match="Exec format error"):
        subprocess.Popen([str(llamafile)])
    process = start("--server", command=(str(llamafile),))
    with urllib.request.urlopen(f"{process.start()}/health") as answer:
        assert b'"argv": ["--server", "--host", "127.0.0.1", "--port"' in answer.read()


def test_a_file_that_is_no_program(start: Any, tmp_path: Path) -> None:
    garbage = tmp_path / "server"
    garbage.write_bytes(b"\x7fELF and no more")
    garbage.chmod(0o755)
    with pytest.raises(RunnerError, match=r"ended with status 127 before it was ready; .*\n.*server cannot be started"):
        start(command=(str(garbage),)).start()


# ----------------------------------------------------------------------------------------- restarts


@linux
def test_it_is_started_again_within_a_budget(start: Any, tmp_path: Path) -> None:
    now = 0.0
    pids = tmp_path / "pids"
    process = start("--pids", str(pids), "--say", "the last words", max_restarts=2, clock=lambda: now)
    url = process.start()
    assert process.revive() == url, "it runs: nothing to do"
    for restart in (1, 2):
        server, child = pids_in(pids)[-2:]
        os.kill(server, signal.SIGKILL)
        until(lambda: not process.is_running, "it dies")
        url = process.revive()
        assert answers(url)
        until(lambda child=child: not is_alive(child), "what it had started ends, too")
        pids_in(pids, restart + 1)
    os.kill(pids_in(pids)[-2], signal.SIGKILL)
    until(lambda: not process.is_running, "it dies once more")
    with pytest.raises(RunnerDead, match=r"ended by signal 9 \(Killed\) after 2 restarts within 10 minutes") as caught:
        process.revive()
    assert "the last words" in str(caught.value)
    now = 601.0
    assert answers(process.revive()), "ten minutes later the budget is whole again"


@linux
def test_many_threads_start_it_once(start: Any, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    process = start("--pids", str(pids))
    process.start()
    os.kill(pids_in(pids)[0], signal.SIGKILL)
    until(lambda: not process.is_running, "it dies")
    urls: list[str] = []
    threads = [threading.Thread(target=lambda: urls.append(process.revive())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(urls) == 8
    assert len(set(urls)) == 1
    assert len(pids_in(pids, 2)) == 4, "one restart for all"


# ----------------------------------------------------------------------------------- under an engine


@contextmanager
def managed_engine(pids: Path, **options: Any) -> Iterator[Engine]:
    """An engine that starts a llama-server of its own; both are gone at the end."""
    command = (sys.executable, str(MODEL), "--dialect", "llamacpp", "--pause", "0.02", "--pids", str(pids))
    with nothing_left():
        engine = Engine(create_runner(context_of(command=command, **options)), TOKENIZER)
        try:
            yield engine
        finally:
            engine.close()
    assert not any(is_alive(pid) for pid in pids_in(pids))


def prompt(i: int) -> list[int]:
    return [i, 8, 9]


@linux
def test_a_server_that_dies_is_started_again_and_what_had_not_begun_is_asked_again(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with managed_engine(pids, retries=2) as engine:
        answers = Answers()
        begun = [ask(engine, prompt(i), greedy(NUM_TOKENS)) for i in range(4)]
        while len(answers.deltas) < 4:
            answers.take(engine.step())
        fresh = [ask(engine, prompt(i), greedy(NUM_TOKENS)) for i in range(4, 8)]
        os.kill(pids_in(pids)[0], signal.SIGKILL)
        drive(engine, answers)
        for i, ticket in enumerate(begun):
            done = answers.of(ticket)
            assert list(done.token_ids) == expected(prompt(i), NUM_TOKENS)[: len(done.token_ids)]
            assert done.error is None or "broke off its answer" in done.error
        assert any(answers.of(ticket).error for ticket in begun), "the kill came too late to mean anything"
        for i, ticket in enumerate(fresh, 4):
            assert answers.ids(ticket) == expected(prompt(i), NUM_TOKENS), "it had not begun, and was lost"
        assert len(pids_in(pids, 2)) == 2, "one restart for all"


@linux
def test_one_that_dies_too_often_takes_the_engine_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with managed_engine(pids, restarts=0, retries=2) as engine:
        os.kill(pids_in(pids)[0], signal.SIGKILL)
        ticket = ask(engine, prompt(5), greedy(NUM_TOKENS))
        error = drive(engine).of(ticket).error
        assert error is not None
        assert re.search(r"ended by signal 9 \(Killed\) after 0 restarts within 10 minutes", error), error
        with pytest.raises(EngineDead):
            ask(engine, prompt(5), greedy(NUM_TOKENS))


@linux
def test_a_server_that_hangs_does_not_keep_the_engine_from_closing(tmp_path: Path, hasty_keeper: None) -> None:
    pids = tmp_path / "pids"
    with managed_engine(pids) as engine:
        os.kill(pids_in(pids)[0], signal.SIGSTOP)  # it neither answers nor ends
        ask(engine, prompt(5), greedy(NUM_TOKENS))
        threading.Timer(0.2, engine.wake).start()
        engine.step()


# ------------------------------------------------------------------------------------------ orphans

OWNER = """
    import os, signal, sys, threading, time
    from nanovllm_runner_http.process import ServerProcess
    sys.path.insert(0, {tests!r})
    from test_http_process import answers

    process = ServerProcess([sys.executable, {program!r}, "--pids", sys.argv[1]], answers)
    # Not from the main thread: what is tied to the thread that starts it would end with that thread.
    thread = threading.Thread(target=process.start)
    thread.start()
    thread.join()
    assert process.is_running
    print("ready", flush=True)
    {end}
    time.sleep(600)
"""


@linux
@pytest.mark.parametrize(
    ("sent", "end"),
    [
        (signal.SIGINT, ""),
        (signal.SIGTERM, ""),
        (signal.SIGKILL, ""),
        (None, "os.abort()"),
        (None, "sys.exit()"),
        (None, "os._exit(0)"),
        (None, "raise RuntimeError('ours')"),
    ],
    ids=["SIGINT", "SIGTERM", "SIGKILL", "a crash", "leaving", "leaving in a hurry", "an exception"],
)
def test_no_end_of_ours_leaves_it_behind(sent: signal.Signals | None, end: str, tmp_path: Path) -> None:
    script = textwrap.dedent(OWNER).format(tests=str(PROGRAM.parent), program=str(PROGRAM), end=end)
    pids = tmp_path / "pids"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(pids)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        server, child = pids_in(pids)
        if sent is not None:
            assert is_alive(server)
            owner.send_signal(sent)
        owner.wait(30)
    until(lambda: not is_alive(server) and not is_alive(child), "the server and its child end")


@linux
def test_a_killed_keeper_does_not_leave_it_behind(start: Any, tmp_path: Path) -> None:
    process = start("--pids", str(tmp_path / "pids"))
    process.start()
    server, child = pids_in(tmp_path / "pids")
    os.kill(os.getpgid(server), signal.SIGKILL)
    until(lambda: not process.is_running, "its end is seen")
    assert is_alive(server)
    assert answers(process.revive()), "it was started again"
    until(lambda: not is_alive(server) and not is_alive(child), "the former server ends")


# ----------------------------------------------------------------------------------------- progress


def test_a_terminal_shows_what_is_waited_for() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        with Waiting("starting", stream) as line:
            line.update("loading [bold]tensors")
            if stream is terminal:
                until(lambda: "tensors" in terminal.getvalue(), "it is drawn")
    assert "loading [bold]tensors" in terminal.getvalue()
    assert pipe.getvalue() == ""
