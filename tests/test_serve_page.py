"""The page at `/`: its files, what guards them, and all of it in a real Chromium."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

from browser_support import Browser, Cable, chromium, needs_browser
from nanovllm.aio import AsyncLLM
from nanovllm.batch import Batch, SeqOutput
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.errors import RunnerDead, TokenizerError
from nanovllm.stats import StepStats
from nanovllm_server import page
from nanovllm_server.keys import Keys
from nanovllm_server.options import ServerOptions
from serve_support import Served, serving
from support import REPO

KEY = "a-key-of-sixteen-characters"
STATIC = files("nanovllm_server") / "static"
NAMES = [path.rpartition("/")[2] or "index.html" for path in page.OPEN_PATHS]
DIRECTIVES = {
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'",
}  # fmt: skip
VARYING = {"date", "x-request-id"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as one:
        yield one


def get(server: Served, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        found = {k.lower(): v for k, v in response.getheaders() if k.lower() not in VARYING}
        return response.status, found, response.read()
    finally:
        connection.close()


# ------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("path", page.OPEN_PATHS)
def test_each_file_comes_whole_and_with_the_headers_that_guard_it(served: Served, path: str) -> None:
    status, headers, body = get(served, path)
    assert status == 200
    assert body == (STATIC / (path.rpartition("/")[2] or "index.html")).read_bytes()
    assert set(headers["content-security-policy"].split("; ")) == DIRECTIVES
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-cache"
    assert headers["referrer-policy"] == "no-referrer"
    assert not {"set-cookie", "access-control-allow-origin", "accept-ranges"} & headers.keys()
    assert get(served, path, "HEAD") == (200, headers, b"")
    # CVE-2025-62727 was a Range header that took long to read: none is read here.
    assert get(served, path, Range="bytes=" + ",".join(f"{i}-{i}" for i in range(500))) == (200, headers, body)
    assert get(served, path, "POST")[0] == 405


def test_a_file_that_is_there_already_is_not_sent_again(served: Served) -> None:
    tags = set()
    for path in page.OPEN_PATHS:
        _, headers, _ = get(served, path)
        tags.add(tag := headers["etag"])
        for known in (tag, f'"other", W/{tag}'):
            status, same, body = get(served, path, If_None_Match=known)
            assert (status, body, same["etag"], same["content-security-policy"]) == (
                304, b"", tag, headers["content-security-policy"],
            )  # fmt: skip
        assert get(served, path, If_None_Match='"other"')[0] == 200
    assert len(tags) == len(page.OPEN_PATHS)


@pytest.mark.parametrize(
    "path",
    ["/static", "/static/", "/static/index.html", "/static/page.py", "/static/../page.py", "/static/%2e%2e/page.py",
     "/static/..%2fpage.py", "/static/app.js/", "//static/app.js", "/Static/app.js", "/static/app.js%00", "/index.html",
     "/static//app.js", "/static/%5c..%5cpage.py"],
)  # fmt: skip
def test_nothing_but_the_files_is_there(served: Served, path: str) -> None:
    status, _, body = get(served, path)
    assert (status, b"default-src" in body, b"import" in body) == (404, False, False)


def test_with_keys_the_files_are_all_that_is_open() -> None:
    with serving(keys=Keys([KEY])) as server:
        for path in page.OPEN_PATHS:
            assert get(server, path)[0] == 200
            for game in (path + "/", "/" + path, path + "%20", path.upper() + "X", path + ";x"):
                assert get(server, game)[0] == 401


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_that_its_policy_forbids() -> None:
    tags = Tags()
    tags.feed((STATIC / "index.html").read_text("utf-8"))
    loaded = {attributes[key] for _, attributes in tags.found for key in ("src", "href") if key in attributes}
    assert {f"/{path}" for path in loaded} <= set(page.OPEN_PATHS)
    assert not [a for _, a in tags.found if any(key == "style" or key.startswith("on") for key in a)]
    assert all(a.get("src") for tag, a in tags.found if tag == "script")
    assert "style" not in {tag for tag, _ in tags.found}
    ids = [a["id"] for _, a in tags.found if "id" in a]
    assert len(ids) == len(set(ids))
    for name in NAMES:
        text = (STATIC / name).read_text("utf-8")
        assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.-]+\.\w", text.replace("// ", "")), name
        if name.endswith(".js"):
            assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", text)
            assert {f"/static/{other}" for other in re.findall(r'from "\./(.+?)"', text)} <= set(page.OPEN_PATHS)
            assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= set(ids), name


def test_the_files_are_in_the_package_and_no_others() -> None:
    assert sorted(one.name for one in STATIC.iterdir()) == sorted(NAMES)
    assert sum(len((STATIC / name).read_bytes()) for name in NAMES) < 48 << 10


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_what_it_stands_on(scheme: int) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what a picture is made of."""
    blocks = re.findall(r":root \{(.*?)\}", (STATIC / "style.css").read_text("utf-8"), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[scheme]))

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(colours[a]), luminance(colours[b])))
        return (high + 0.05) / (low + 0.05)

    for text in ("text", "quiet", "bad"):
        for ground in ("page", "panel", "soft"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast("on-accent", "accent") >= 4.5
    assert contrast("decode", "page") >= 3
    assert contrast("used", "panel") >= 3
    assert contrast("used", "free") >= 3


# ----------------------------------------------------------------------------------------- in Chromium


class Pace:
    """An observer that makes each step take a while, so that a person, or a test, can see it."""

    seconds = 0.0

    def on_step(self, stats: StepStats) -> None:
        time.sleep(self.seconds)


@pytest.fixture(scope="module")
def pace() -> Pace:
    return Pace()


@pytest.fixture(scope="module")
def demo(pace: Pace) -> Iterator[Served]:
    """The embedded model, in a pool that a picture of it has a square for each block of."""
    llm = AsyncLLM.from_config(model="demo", cache={"num_blocks": 256}, scheduler={"max_num_seqs": 8})
    llm.engine.observe(pace)
    with serving(llm=llm) as one:
        yield one


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def tab(started: Browser) -> Iterator[Browser]:
    """Closed before its server, which would wait for it."""
    yield started
    started.driver.get("about:blank")


ANSWER = "#log .turn.assistant:last-child .text"
NOTE = "#log .turn.assistant:last-child .note"


def opened(tab: Browser, url: str, **looks: object) -> Browser:
    tab.open(url + "/", **looks)  # type: ignore[arg-type]
    tab.wait(lambda: tab.text("#status") == "Connected")
    return tab


def choose(tab: Browser, **values: str) -> None:
    """Set fields of the settings, as a person would."""
    if tab.find("#settings").get_attribute("open") is None:
        tab.find("#settings summary").click()
    for name, value in values.items():
        field = tab.find(f"#settings [name={name}]")
        field.clear()
        field.send_keys(value)


def say(tab: Browser, text: str) -> None:
    tab.find("#message").send_keys(text + "\n")


@needs_browser
def test_paris_arrives_in_pieces(tab: Browser, demo: Served, pace: Pace) -> None:
    pace.seconds = 0.02
    opened(tab, demo.url)
    choose(tab, temperature="0", max_tokens="32")
    tab.js(
        """window.seen = [];
        new MutationObserver((changes) => window.seen.push(document.querySelector(arguments[0])?.textContent ?? ""))
          .observe(document.querySelector("#log"), { subtree: true, childList: true, characterData: true });""".replace(
            "arguments[0]", repr(ANSWER)
        )
    )
    say(tab, "What is the capital of France?")
    tab.wait(lambda: tab.text(NOTE))
    assert tab.text(ANSWER) == "The capital of France is Paris."
    seen = [text for text in tab.js("return window.seen") if text]
    pieces = sorted(set(seen), key=len)
    assert len(pieces) >= 4, pieces
    assert all(text.startswith(before) for before, text in pairwise(pieces))
    assert re.fullmatch(r"10 tokens · first after \d+ ms · \d+ tokens/s", tab.text(NOTE))
    tab.wait(lambda: tab.text("#kv-line") == "0 of 256 blocks used")
    totals = demo.llm.stats()
    tab.wait(lambda: tab.text("#num-steps") == f"{totals.num_steps:,}")
    assert tab.text("#decode-tokens") == f"{totals.num_decode_tokens:,}"
    # The next answer knows the conversation, and finds its beginning computed.
    say(tab, "And of Italy?")
    tab.wait(lambda: "prompt tokens cached" in tab.text(NOTE))
    assert tab.complaints() == []
    hosts = tab.js("return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)")
    assert set(hosts) == {demo.url}


@needs_browser
def test_a_real_server_with_a_page_open_answers_and_ends_when_it_is_told_to(tab: Browser, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from nanovllm.cli import main; main()", "serve", "--model", "demo", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"listening at (http://\S+),", process.stdout.readline())
            assert found
            opened(tab, found[1])  # it may say first that the model is loading
            choose(tab, temperature="0")
            say(tab, "What is the capital of France?")
            tab.wait(lambda: tab.text(NOTE))
            assert tab.text(ANSWER) == "The capital of France is Paris."
            process.terminate()
            assert process.wait(20) == 0
            tab.wait(lambda: tab.text("#status") == "Disconnected, trying again")
        finally:
            process.kill()


@needs_browser
@pytest.mark.parametrize("how", ["button", "escape"])
def test_a_stopped_answer_gives_its_blocks_back(tab: Browser, demo: Served, pace: Pace, how: str) -> None:
    pace.seconds = 0.05
    opened(tab, demo.url)
    choose(tab, temperature="1", seed="7")
    say(tab, "Tell me a story")
    tab.wait(lambda: len(tab.text(ANSWER)) > 20)
    tab.wait(lambda: tab.text("#running") == "1")
    assert int(tab.text("#kv-used")) > 0
    assert len(tab.driver.find_elements("css selector", "#kv [data-kind=used]")) > 0
    assert demo.llm.engine.scheduler.running
    if how == "button":
        tab.find("#stop").click()
    else:
        tab.find("#message").send_keys("\ue00c")
    tab.wait(lambda: tab.text(NOTE) == "Stopped.")
    demo.wait_for_free_blocks()
    text = tab.text(ANSWER)
    tab.wait(lambda: (tab.text("#running"), tab.text("#kv-used")) == ("0", "0"))
    assert tab.text("#kv-line") == "0 of 256 blocks used"
    assert demo.llm.engine.scheduler.manager.num_used == 0
    assert tab.text(ANSWER) == text
    # What was said so far counts, and the page is ready for more.
    pace.seconds = 0.0
    choose(tab, temperature="0", seed="")
    say(tab, "What is the capital of Spain?")
    tab.wait(lambda: "tokens/s" in tab.text(NOTE))
    assert tab.find("#send").is_displayed()
    assert not tab.find("#stop").is_displayed()


@needs_browser
def test_many_at_once_are_seen_as_a_batch(tab: Browser, demo: Served, pace: Pace) -> None:
    pace.seconds = 0.03
    opened(tab, demo.url)
    prompt = "Once upon a time there was a happy owl called Paul, who lived in a house by the sea and had a red ball. "
    with demo.client() as client:
        client.completions.create(model="demo", prompt=prompt, max_tokens=1)  # computed once, shared by the next six
        stream = client.completions.create(
            model="demo", prompt=[prompt] * 2, n=3, max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        tab.wait(lambda: tab.text("#running") == "6")
        tab.wait(lambda: int(tab.text("#kv-shared")) >= 1)
        tab.wait(lambda: re.search(r"6 sequences, 6 decode \+ 0 prefill tokens", tab.text("#last-step")))
        for kind in ("decode", "prefill"):
            assert tab.driver.find_elements("css selector", f"#steps rect[data-kind={kind}]")
        for kind in ("used", "shared", "free"):
            assert tab.driver.find_elements("css selector", f"#kv [data-kind={kind}]")
        stream.close()
    tab.wait(lambda: tab.text("#running") == "0")
    tab.wait(lambda: int(tab.text("#kv-cached")) > 0)
    assert tab.text("#kv-shared") == "0"


@needs_browser
def test_text_is_never_markup(tab: Browser) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><b>b</b>"
    with serving(options=ServerOptions(model_name=evil)) as server:
        opened(tab, server.url)
        say(tab, evil)
        tab.wait(lambda: tab.text("#log .turn:last-child .note"))
        assert tab.text("#log .turn.user .text") == evil
        assert evil in tab.text("#about")
        assert tab.js("return document.querySelectorAll('main img, main b, header b').length") == 0
        assert tab.driver.title == "nanovllm"
        tab.driver.get("about:blank")


class WithoutTemplate(SimpleBPETokenizer):
    def chat(self, messages: object) -> list[int]:
        raise TokenizerError("no chat template is known")


@needs_browser
def test_a_model_that_knows_no_conversation_continues_a_text(tab: Browser) -> None:
    with serving(tokenizer=WithoutTemplate()) as server:
        opened(tab, server.url)
        choose(tab, temperature="0", max_tokens="9")
        say(tab, "hello")
        tab.wait(lambda: tab.text(NOTE))
        _, expected = server.post("/v1/completions", {"prompt": "hello", "max_tokens": 9, "temperature": 0})
        assert tab.text(ANSWER) == expected["choices"][0]["text"]
        assert tab.text(NOTE).startswith("9 tokens")
        assert tab.text(NOTE).endswith("cut at the limit")
        tab.driver.get("about:blank")


class Dying(MockRunner):
    def execute(self, batch: Batch) -> list[SeqOutput]:
        raise RunnerDead("the device is gone")


@needs_browser
def test_a_dead_engine_is_no_lost_connection(tab: Browser) -> None:
    with serving(Dying()) as server:
        opened(tab, server.url)
        say(tab, "hello")
        tab.wait(lambda: tab.text("#status") == "The engine has stopped")
        tab.wait(lambda: tab.find(NOTE).get_attribute("class") == "note error")
        assert "device" not in tab.text("body")  # what went wrong is in the server's log
        assert tab.text("#failed-steps") == "1"
        tab.driver.get("about:blank")


@needs_browser
def test_a_key_is_asked_for_and_kept_nowhere(tab: Browser) -> None:
    with serving(keys=Keys([KEY])) as server:
        tab.open(server.url + "/")
        tab.wait(lambda: tab.find("#key-form").is_displayed())
        assert tab.text("#status") == "A key is needed"
        assert tab.driver.switch_to.active_element.get_attribute("id") == "key"
        tab.find("#key").send_keys("not-the-key-that-is-asked-for\n")
        tab.wait(lambda: "does not know this key" in tab.text("#key-error"))
        tab.find("#key").send_keys(KEY + "\n")
        tab.wait(lambda: tab.text("#status") == "Connected")
        assert not tab.find("#key-form").is_displayed()
        say(tab, "hello")
        tab.wait(lambda: tab.text("#log .turn:last-child .note"))
        kept = tab.js(
            "return JSON.stringify([localStorage, sessionStorage]) + document.cookie + location.href"
            " + document.documentElement.outerHTML + document.querySelector('#key').value"
        )
        assert KEY not in kept
        tab.driver.refresh()
        tab.wait(lambda: tab.find("#key-form").is_displayed())


@needs_browser
def test_it_says_that_it_is_disconnected_and_comes_back(tab: Browser, demo: Served, pace: Pace) -> None:
    pace.seconds = 0.05
    cable = Cable(demo.port)
    try:
        opened(tab, cable.url)
        say(tab, "Tell me a story")
        tab.wait(lambda: tab.text(ANSWER))
        cable.unplug()
        tab.wait(lambda: tab.text("#status") == "Disconnected, trying again")
        assert tab.find("#status").get_attribute("data-state") == "down"
        tab.wait(lambda: "connection to the server was lost" in tab.text(NOTE))
        assert tab.find("#message").get_attribute("value") == "Tell me a story"  # to be sent again
        demo.wait_for_free_blocks()
        cable.plug()
        tab.wait(lambda: tab.text("#status") == "Connected")
        pace.seconds = 0.0
        tab.find("#send").click()
        tab.wait(lambda: "tokens/s" in tab.text(NOTE))
    finally:
        cable.unplug()


@needs_browser
def test_everything_is_reached_by_keyboard_and_has_a_name(tab: Browser, demo: Served) -> None:
    opened(tab, demo.url)
    assert tab.driver.switch_to.active_element.get_attribute("id") == "message"
    tab.find("#settings summary").send_keys("\n")
    reached = set()
    for _ in range(30):
        reached.add(tab.js("const e = document.activeElement; return e.id || e.name || e.tagName"))
        tab.driver.switch_to.active_element.send_keys("\t")
        if tab.js("return document.activeElement === document.body"):
            tab.find("header").click()
    assert reached >= {"log", "SUMMARY", "system", "temperature", "top_p", "top_k", "max_tokens", "seed", "message"}
    nodes = tab.cdp("Accessibility.getFullAXTree")["nodes"]
    asked = [n for n in nodes if n.get("role", {}).get("value") in ("button", "textbox", "spinbutton", "image", "log")]
    assert len(asked) >= 12
    assert [n for n in asked if not n.get("name", {}).get("value") and not n.get("ignored")] == []


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(tab: Browser, demo: Served, pace: Pace, scheme: str, tmp_path: Path) -> None:
    pace.seconds = 0.0
    opened(tab, demo.url, width=360, height=720, scheme=scheme, motion="reduce")
    choose(tab, temperature="0")
    say(tab, "What is the capital of France?")
    tab.wait(lambda: "tokens/s" in tab.text(NOTE))
    for view in ("chat", "engine"):
        tab.find(f"nav [data-view={view}]").click()
        assert tab.find(f"#{view}").is_displayed()
        assert tab.find(f"nav [data-view={view}]").get_attribute("aria-pressed") == "true"
        assert tab.js("return document.documentElement.scrollWidth") == 360
        outside = tab.js(
            "const isOut = (box) => box.right > 360.5 || box.left < -0.5;"
            "return [...document.querySelectorAll('main *, header *')]"
            ".filter((e) => e.checkVisibility() && isOut(e.getBoundingClientRect())).map((e) => e.outerHTML)"
        )
        assert outside == []
    ground = tab.js("return getComputedStyle(document.body).backgroundColor")  # rgb(r, g, b)
    shade = luminance("#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", ground)[:3]))
    assert shade > 0.8 if scheme == "light" else shade < 0.05
    assert tab.js("return document.getAnimations().length") == 0


@needs_browser
def test_pictures_for_the_documentation(tab: Browser, demo: Served, pace: Pace, tmp_path: Path) -> None:
    """`PICTURES=docs/images pytest tests/test_serve_page.py -k pictures` makes those of docs/server/page.md."""
    where = Path(os.environ.get("PICTURES", tmp_path))
    pace.seconds = 0.03
    opened(tab, demo.url)
    choose(tab, temperature="0")
    tab.find("#settings summary").click()
    prompt = "Once upon a time there was a happy owl called Paul, who lived in a house by the sea and had a red ball. "
    with demo.client() as client:
        say(tab, "What is the capital of France?")
        tab.wait(lambda: "tokens/s" in tab.text(NOTE))
        client.completions.create(model="demo", prompt=prompt, max_tokens=1)
        say(tab, "Tell me a story")
        tab.wait(lambda: tab.text("#running") == "1")
        stream = client.completions.create(
            model="demo", prompt=[prompt] * 4, n=3, max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        tab.wait(lambda: len(tab.text(ANSWER)) > 120)
        for name, scheme, width, height in (
            ("page-light", "light", 1180, 800), ("page-dark", "dark", 1180, 800), ("page-phone", "light", 360, 720)
        ):  # fmt: skip
            tab.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            tab.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
            assert tab.driver.save_screenshot(str(where / f"{name}.png"))
        stream.close()
    for one in (REPO / "docs" / "images").glob("page-*.png"):
        assert one.stat().st_size < 150_000, f"{one.name} is too large"
