"""Advisories of comparable projects, one test each: what was done to them, done to us. docs/security.md lists them all.

The tests are named by the first id of their row; what has no part here that it could hit is in that page, with why.
"""

from __future__ import annotations

import ast
import http.client
import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from engine_support import ByteTokenizer
from http_support import wait_until
from models_support import LLAMA, write_checkpoint
from nanovllm import LLM, SamplingParams
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm.errors import ConfigError, ModelError, NanoVLLMError, TokenizerError, UnsupportedModelError
from nanovllm_models.checkpoint import load_checkpoint
from nanovllm_runner_http.dialects.llamacpp import LlamaCpp
from nanovllm_server.app import ROUTES
from nanovllm_server.bind import bind
from nanovllm_server.keys import Keys
from nanovllm_server.openapi import document
from nanovllm_server.options import ServerOptions
from nanovllm_tokenizers.chat import ChatTemplate
from serve_support import Served, Witness, serving, witnessing
from support import REPO, SPEC, needs_spec

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ALICE, BOB = "the-key-of-alice", "the-key-of-bob--"
ASK: dict[str, Any] = {"prompt": "hello world", "max_tokens": 2, "temperature": 0}
SAY: dict[str, Any] = {"messages": [{"role": "user", "content": "hello world"}], "max_tokens": 2, "temperature": 0}
SOURCES = [path for root in ("core", "plugins") for path in sorted((REPO / root).rglob("*.py"))]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(MockRunner(script=Script(delay=0.001))) as server:
        yield server


@pytest.fixture(scope="module")
def witness(server: Served) -> Iterator[Witness]:
    with witnessing(server) as witness:
        yield witness


def refused(server: Served, witness: Witness, path: str, body: dict[str, Any], *fields: dict[str, Any]) -> None:
    """Each of `fields` makes the call a bad one, which is said, and which nobody else notices."""
    with witness.undisturbed():
        for wrong in fields:
            status, answer = server.post(path, {**body, **wrong})
            assert status == 400, (wrong, answer)
            assert answer["error"]["type"] == "invalid_request_error"
        assert server.post(path, body)[0] == 200
    assert server.llm.health().is_ready


def cached(server: Served, key: str, **fields: Any) -> int:
    prompt = {"prompt": "a b c d e f g h i j k l m n o p q r s t u v w x y z", **fields}
    answer = server.post(TEXT, {**ASK, **prompt}, Authorization=f"Bearer {key}")[1]
    found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def requirement(distribution: str, name: str) -> Requirement:
    return next(r for r in map(Requirement, requires(distribution) or ()) if r.name == name)


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


# ------------------------------------------------------------------------------------- prefix cache, isolation


def test_CVE_2025_25183_prefixes_whose_hashes_collide_are_not_shared() -> None:
    texts = ["abcdef", "efcdab", "cdabef", "abcdef"]

    def answers(**how: Any) -> list[tuple[int, ...]]:
        with LLM.from_components(MockRunner(256, block_size=2), ByteTokenizer(), **how) as llm:
            return [llm.generate(text, SamplingParams(temperature=0, max_tokens=4))[0].token_ids for text in texts]

    assert answers(hash_block=lambda parent, tokens: b"the same") == answers()


def test_CVE_2025_46570_what_one_key_asked_is_not_cached_for_another() -> None:
    with serving(keys=Keys([ALICE, BOB])) as server:
        assert cached(server, ALICE) == 0
        assert cached(server, ALICE) > 0
        assert cached(server, BOB) == 0
        assert cached(server, ALICE, cache_salt="mine") == 0


def test_CVE_2026_105756_a_salt_that_is_none_is_refused(server: Served, witness: Witness) -> None:
    salts: list[Any] = ["", "x" * 1000, 1, 1.5, True, [], {}, ["x"]]
    refused(server, witness, TEXT, ASK, *({"cache_salt": salt} for salt in salts))


def test_CVE_2026_105754_no_call_takes_hashes_or_tensors(server: Served, witness: Witness) -> None:
    names = ("prompt_embeds", "kv_transfer_params", "block_hashes", "mm_hashes", "cache_hash", "past_key_values", "kv")
    refused(server, witness, TEXT, ASK, *({name: "AAAA"} for name in names))
    schemas = document("1", [o for module in ROUTES for o in module.OPERATIONS])["components"]["schemas"]
    bodies = [name for name in schemas if name.endswith(("Request", "SeedsChat", "ChatMessage", "TextPart"))]
    assert len(bodies) >= 6
    fields = {field for name in bodies for field in schemas[name]["properties"]}
    assert not {field for field in fields if re.search(r"hash|tensor|embed|kv|block", field)}


# ------------------------------------------------------------------------------------ parameters of one request


def test_CVE_2026_93840_ids_beyond_the_logits_are_refused(server: Served, witness: Witness) -> None:
    vocab = server.llm.info.vocab_size
    assert vocab is not None
    ids = (vocab, vocab + 1, 2**31 - 1, 2**31, 2**63, -1)
    refused(server, witness, TEXT, ASK, *({"prompt": [1, i]} for i in ids), *({"logit_bias": {str(i): 1}} for i in ids))
    refused(server, witness, TEXT, ASK, {"allowed_token_ids": [vocab]}, {"bad_words": ["hello"]})


def test_CVE_2026_34756_n_is_bounded_and_a_whole_number(server: Served, witness: Witness) -> None:
    values: list[Any] = [10**18, 129, 0, -1, True, 1.0, "1", [1], {}]
    refused(server, witness, TEXT, ASK, *({"n": n} for n in values), {"best_of": 10**18}, {"best_of": 2})
    refused(server, witness, CHAT, SAY, *({"n": n} for n in values))
    refused(server, witness, TEXT, ASK, {"prompt": ["hi"] * 100, "n": 100})


def test_CVE_2026_114051_fields_that_contradict_each_other_are_refused(server: Served, witness: Witness) -> None:
    refused(server, witness, TEXT, ASK, {"min_tokens": 3}, {"min_tokens": 10**9}, {"min_tokens": -1})
    refused(server, witness, CHAT, SAY, {"top_logprobs": 2}, {"stream_options": {"include_usage": True}})


def test_CVE_2026_114051_health_follows_the_engine() -> None:
    with serving(MockRunner(script=Script(dead_step=1))) as server:
        assert server.call("GET", "/readyz")[0] == server.call("GET", "/livez")[0] == 200
        assert server.post(TEXT, ASK)[0] >= 500
        wait_until(lambda: not server.llm.health().is_live)
        assert server.call("GET", "/readyz")[0] == server.call("GET", "/livez")[0] == 503
        assert server.call("GET", "/healthz")[0] == 503


def test_CVE_2026_116173_more_scores_than_can_be_had_are_refused(server: Served, witness: Witness) -> None:
    refused(server, witness, TEXT, ASK, *({"logprobs": n} for n in (21, 10**9, -1, True)))
    refused(server, witness, CHAT, SAY, *({"logprobs": True, "top_logprobs": n} for n in (21, 10**9, -1)))
    refused(server, witness, TEXT, ASK, {"logit_bias": {str(i): 1 for i in range(1025)}}, {"stop_token_ids": [1] * 257})


def test_CVE_2026_116173_numbers_that_cannot_be_drawn_from_end_one_request() -> None:
    """The token 7 makes its sequence's logits NaN."""
    with (
        serving(MockRunner(script=Script(nan_token=7))) as server,
        witnessing(server) as witness,
        witness.undisturbed(),
    ):
        assert server.post(TEXT, {**ASK, "prompt": [5, 7]})[0] == 500
        assert server.post(TEXT, {**ASK, "prompt": [5, 6]})[0] == 200


@pytest.mark.parametrize("hook", ["encode", "token_bytes", "chat"])
def test_CVE_2026_105757_a_tokenizer_that_raises_ends_one_request(hook: str) -> None:
    class Raises(ByteTokenizer):
        """For what has an X in it."""

        def encode(self, text: str, parse_special: bool = False) -> list[int]:
            if hook == "encode" and "X" in text:
                raise KeyError("X")
            return super().encode(text)

        def token_bytes(self, token_id: int) -> bytes:
            if hook == "token_bytes" and token_id == ord("X"):
                raise KeyError("X")
            return super().token_bytes(token_id)

        def chat(self, messages: Any) -> list[int]:
            if hook == "chat" and "X" in messages[0]["content"]:
                raise KeyError("X")
            return super().chat(messages)

    script = Script(tokens=b"X") if hook == "token_bytes" else Script()
    bad = [{"role": "user", "content": "aX"}]
    with serving(MockRunner(256, script=script), Raises()) as server:
        status, answer = server.post(CHAT, {**SAY, "messages": bad})
        assert status == 500
        assert "KeyError" not in json.dumps(answer)
        body = {**ASK, "logit_bias": {str(ord("X")): -100}, "prompt": "a"}
        assert server.post(TEXT, body)[0] == 200
        assert server.llm.health().is_ready


def test_CVE_2025_48944_grammars_and_schemas_are_refused_by_name(server: Served, witness: Witness) -> None:
    bad = {"type": "nonsense", "pattern": "(((("}
    fields: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": bad}}},
        {"guided_json": bad},
        {"guided_regex": "(a+)+$"},
        {"guided_grammar": "root ::= root"},
        {"structured_outputs": {"regex": "(("}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": bad}}]},
    ]
    refused(server, witness, CHAT, SAY, *fields)


def test_CVE_2025_62426_a_request_brings_no_template(server: Served, witness: Witness) -> None:
    loops = "{% for i in range(10**9) %}x{% endfor %}"
    refused(server, witness, CHAT, SAY, {"chat_template": loops}, {"chat_template_kwargs": {"chat_template": loops}})
    refused(server, witness, CHAT, SAY, {"chat_template_kwargs": {"tokenize": False}}, {"continue_final_message": True})


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["hello", ""]])
def test_CVE_2024_8768_an_empty_prompt_is_refused(server: Served, witness: Witness, prompt: Any) -> None:
    refused(server, witness, TEXT, ASK, {"prompt": prompt})


def test_CVE_2024_8768_a_prompt_that_is_nothing_but_its_beginning_is_answered(server: Served) -> None:
    assert server.post(TEXT, {**ASK, "prompt": [1]})[0] == 200
    assert server.post(CHAT, {**SAY, "messages": [{"role": "user", "content": ""}]})[0] == 200


def test_CVE_2026_44222_text_never_becomes_a_special_token() -> None:
    from nanovllm.aio import AsyncLLM

    with serving(llm=AsyncLLM("demo", runner="numpy")) as server:
        tokenizer = server.llm.tokenizer
        assert tokenizer is not None
        specials = [i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i)]
        assert specials
        for text in ("<|im_start|>system", "<|im_end|>", "<s></s>", "<|endoftext|>", "<bos><eos>", "[INST]"):
            ids = server.post("/v1/tokenize", {"text": text})[1]["token_ids"]
            plain = server.post("/v1/tokenize", {"text": "hello"})[1]["token_ids"]
            assert set(ids) & set(specials) <= set(plain) & set(specials)
            assert server.post(CHAT, {**SAY, "messages": [{"role": "user", "content": text}]})[0] == 200


def test_CVE_2026_44222_every_pair_of_parameters_works(server: Served, witness: Witness) -> None:
    fields: list[dict[str, Any]] = [
        {"presence_penalty": 1.5}, {"frequency_penalty": -1.5}, {"repetition_penalty": 1.3}, {"min_tokens": 2},
        {"logit_bias": {"5": 3.0}}, {"stop": ["e"]}, {"stop_token_ids": [3]}, {"ignore_eos": True}, {"n": 2},
        {"logprobs": 2}, {"echo": True}, {"top_k": 3}, {"min_p": 0.2}, {"seed": 4}, {"cache_salt": "s"},
    ]  # fmt: skip
    with witness.undisturbed():
        for i, first in enumerate(fields):
            for second in fields[:i]:
                status, answer = server.post(TEXT, {**ASK, "temperature": 0.8, **first, **second})
                assert status == 200, (first, second, answer)


# ----------------------------------------------------------------------------------------------- the server


def test_CVE_2025_48956_a_giant_header_is_refused(server: Served, witness: Witness) -> None:
    with witness.undisturbed():
        for value in ("a" * 20_000, "a" * 60_000):
            assert server.call("GET", "/v1/models", X_Long=value)[0] == 431
        status = None
        with suppress(OSError, http.client.HTTPException):
            status = server.call("GET", "/v1/models", X_Long="a" * 10_000_000)[0]
        assert status in (None, 400, 431)


def test_CVE_2026_71486_ids_to_turn_into_text_are_bounded() -> None:
    with serving(options=ServerOptions(max_ids=100, max_text_chars=100)) as server:
        assert server.post("/v1/detokenize", {"token_ids": [5] * 100})[0] == 200
        assert server.post("/v1/detokenize", {"token_ids": [5] * 101})[0] == 400
        assert server.post("/v1/detokenize", {"token_ids": [10**6]})[0] == 400
        assert server.post("/v1/tokenize", {"text": "a" * 101})[0] == 400


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files as Linux lists them")
@pytest.mark.parametrize("num", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_CVE_2026_9540_connections_that_come_and_go_leave_nothing_open(server: Served, num: int) -> None:
    def num_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    body = json.dumps({**SAY, "max_tokens": 50, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    call = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    before = num_fds()
    for i in range(num):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(call[: len(call) * (i % 7) // 6])  # nothing, a part of the head, of the body, or all
    wait_until(lambda: num_fds() <= before)
    wait_until(lambda: server.state.admission.num_calls == 0)
    assert server.post(CHAT, SAY)[0] == 200


def test_CVE_2025_59425_keys_are_compared_in_constant_time() -> None:
    """As hashes, by hmac, and all of them; no other comparison of a key is in the file."""
    tree = ast.parse((REPO / "plugins/server/nanovllm_server/keys.py").read_text("utf-8"))
    (owner,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "owner")
    assert "hmac.compare_digest(known, presented)" in ast.unparse(owner)
    (loop,) = (node for node in ast.walk(owner) if isinstance(node, ast.For))
    assert not any(isinstance(node, ast.Break | ast.Return) for node in ast.walk(loop))
    compared = [ast.unparse(node) for node in ast.walk(owner) if isinstance(node, ast.Compare)]
    assert compared == ["scheme.lower() == b'bearer'"]


@pytest.mark.parametrize("host", ["x/livez?", "x/livez#", "/livez?", "x:80@/livez", "localhost/livez/..", "x\\livez"])
def test_CVE_2026_48746_the_host_header_has_no_say_in_who_is_let_in(host: str) -> None:
    with serving(keys=Keys([ALICE])) as server:
        for path in ("/v1/models", f"http://{host}/v1/models", "//livez/../v1/models"):
            assert server.call("GET", path, Host=host)[0] == 401
        assert server.call("GET", "/v1/models", Host=host, Authorization=f"Bearer {ALICE}")[0] in (200, 400)
    assert Version("1.0.0") not in requirement("nanovllm-server", "starlette").specifier


def test_CVE_2025_62727_ranges_are_not_read(server: Served) -> None:
    used = [path for path in SOURCES if re.search(r"FileResponse|StaticFiles", path.read_text("utf-8"))]
    assert used == []
    whole = server.call("GET", "/")
    assert server.call("GET", "/", Range="bytes=" + ",".join(f"{i}-" for i in range(2000))) == whole


def test_CVE_2025_6242_nothing_that_a_request_names_is_fetched(server: Served, witness: Witness) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        parts: list[Any] = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url}},
            {"type": "file", "file": {"file_id": url}},
            {"type": "text", "text": "hi", "image_url": url},
        ]
        refused(server, witness, CHAT, SAY, *({"messages": [{"role": "user", "content": [part]}]} for part in parts))
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_CVE_2024_6587_a_request_names_no_server_to_ask(server: Served, witness: Witness) -> None:
    names = ("api_base", "base_url", "api_key", "url", "upstream", "proxy", "runner", "model_dir")
    refused(server, witness, CHAT, SAY, *({name: "http://127.0.0.1:9/"} for name in names))


@pytest.mark.parametrize(
    "kind", ["image", "image_url", "video", "video_url", "audio_url", "input_audio", "image_embeds"]
)
def test_CVE_2026_22773_pictures_films_and_sounds_are_refused(server: Served, witness: Witness, kind: str) -> None:
    content = [{"type": kind, kind: {"url": "data:image/gif;base64,R0lGODlhAQABAAAAACw="}}]
    refused(server, witness, CHAT, SAY, {"messages": [{"role": "user", "content": content}]})


def test_CVE_2025_62164_a_prompt_is_no_tensor(server: Served, witness: Witness) -> None:
    fields: list[dict[str, Any]] = [{"prompt_embeds": "UEsDBA=="}, {"prompt": [[0.5, 0.5]]}, {"prompt": {"a": 1}}]
    refused(server, witness, TEXT, ASK, *fields)


def test_CVE_2025_30202_one_port_of_this_machine_is_all_that_listens() -> None:
    assert ServerOptions().host == "127.0.0.1"
    table = Path("/proc/self/net/tcp")
    if not table.exists():
        return

    def listening() -> set[str]:
        """The addresses at which this process listens."""
        mine = set()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                mine.add(os.readlink(f"/proc/self/fd/{fd}"))
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
        rows += [line.split() for line in Path("/proc/self/net/tcp6").read_text().splitlines()[1:]]
        return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}

    before = listening()
    with serving() as server:
        server.post(TEXT, ASK)
        assert listening() - before == {f"0100007F:{server.port:04X}"}


def test_CVE_2026_7020_a_models_name_is_no_path(server: Served) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "..\\secret", "model/../model", "a\0b"):
        status, answer = server.post(CHAT, {**SAY, "model": name})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert server.call("GET", "/v1/models/..%2f..%2fetc%2fpasswd")[0] == 404


def test_CVE_2025_23310_chunks_of_one_byte_and_errors_without_a_word_of_the_inside() -> None:
    body = json.dumps(ASK).encode()
    with serving(MockRunner(script=Script(fail_steps=[1]))) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        for wanted in (500, 200):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", TEXT, (bytes([b]) for b in body), headers, encode_chunked=True)
            response = connection.getresponse()
            answer = response.read().decode()
            assert response.status == wanted
            assert not re.search(r"script|step|mock|Runner|Traceback|/[a-z]+/|0x", answer) or wanted == 200
        connection.close()


def test_Ollama_an_address_for_others_needs_keys() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="lets other machines in, and no API keys are set"):
            bind(host, 0, Keys())
    bind("0.0.0.0", 0, Keys([ALICE])).close()


# ---------------------------------------------------------------------------------------------- model files


@pytest.mark.parametrize(
    "payload",
    [
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch MARK') }}",
    ],
)
def test_CVE_2024_34359_a_template_runs_no_code(payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = ""
    with suppress(TokenizerError):
        text = ChatTemplate(payload, "test.jinja", 10.0).render({"messages": SAY["messages"]})
    assert "<class" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "payload",
    [
        "{{ ['{0.__class__.__base__}'.format] | map('call', messages) | list }}",
        "{{ ('{0.__class__.__base__}' | attr('format'))(messages) }}",
    ],
)
def test_CVE_2024_56326_the_sandbox_is_one_that_was_mended(payload: str) -> None:
    text = ""
    with suppress(TokenizerError):
        text = ChatTemplate(payload, "test.jinja", 10.0).render({"messages": SAY["messages"]})
    assert "<class" not in text
    assert Version("3.1.5") not in requirement("nanovllm-tokenizers", "jinja2").specifier


def test_CVE_2025_32434_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')".encode()
    armed = b"c__builtin__\nexec\n(V" + code + b"\ntR."  # protocol 0: builtins.exec(code)
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(armed)
        with pytest.raises((ModelError, UnsupportedModelError)):
            load_checkpoint(tmp_path)
        (tmp_path / name).unlink()
    assert not mark.exists()


def test_TorchScript_a_program_runs_only_where_that_was_allowed(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from nanovllm_runner_torch.archive import find_archive, open_archive

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants its older formats to go
        torch.jit.trace(torch.nn.Identity(), torch.zeros(1)).save(str(tmp_path / "model.pt"))
    archive = find_archive(tmp_path / "model.pt")
    assert archive is not None
    with pytest.raises(ConfigError, match="carries a program"):
        open_archive(archive, [], torch.device("cpu"))
    open_archive(archive, [tmp_path], torch.device("cpu"))


def test_CVE_2026_22807_code_beside_a_model_is_never_run(tmp_path: Path) -> None:
    mark, model = tmp_path / "mark", tmp_path / "model"
    names = {"AutoConfig": "configuration_x", "AutoModelForCausalLM": "modeling_x", "AutoTokenizer": "tokenization_x"}
    write_checkpoint(model, {**LLAMA, "auto_map": {kind: f"{name}.X" for kind, name in names.items()}})
    for name in (*names.values(), "__init__", "sitecustomize", "numpy", "conftest"):
        (model / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')", "utf-8")
    with suppress(NanoVLLMError), LLM(str(model), runner="numpy", tokenizer="simple") as llm:
        llm.generate("a", SamplingParams(max_tokens=1))
    assert not mark.exists()


def test_CVE_2024_50050_nothing_is_pickled_between_processes() -> None:
    picklers = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "zmq"}
    assert [path for path in SOURCES if imported(path) & picklers] == []


def test_CVE_2022_25882_data_of_a_graph_lies_in_its_directory(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from nanovllm_runner_onnx.onnx_file import read_header
    from onnx_files import external, graph_model, save

    directory = tmp_path / "model"
    directory.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    (directory / "link").symlink_to(tmp_path / "secret")
    (directory / "up").symlink_to(tmp_path)
    os.link(tmp_path / "secret", directory / "hard")
    for location in ("../secret", "a/../../secret", str(tmp_path / "secret"), "link", "up/secret", "hard"):
        model = graph_model([external(location=location, offset=0, length=16)])
        with pytest.raises(ModelError, match=r"outside|hard link"):
            read_header(save(directory, model, None), directory)


def test_Tile_bomb_a_shape_needs_its_bytes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from nanovllm_runner_onnx.onnx_file import read_header
    from onnx_files import claimed, graph_model, save

    for dims in ([2**31, 2**10], [2**62, 2**62], [-1]):
        model = graph_model([claimed(dims, name="bomb")])
        with pytest.raises(ModelError, match="bomb"):
            read_header(save(tmp_path, model, None), tmp_path)


def test_CVE_2026_27940_GGUF_is_never_read_here(tmp_path: Path) -> None:
    assert [path for path in SOURCES if imported(path) & {"gguf", "llama_cpp", "ctransformers"}] == []
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(NanoVLLMError):
        LLM(str(tmp_path / "model.gguf"), runner="numpy")


def test_CVE_2026_21869_upstream_servers_get_no_field_that_is_not_listed() -> None:
    assert not {"n_discard", "n_predict", "slot_id", "image_data", "prompt"} & LlamaCpp.extra_fields


def test_CVE_2026_1260_only_a_mended_sentencepiece_is_used() -> None:
    assert Version("0.2.0") not in requirement("nanovllm-tokenizers", "sentencepiece").specifier


def test_CVE_2025_2099_transformers_is_no_part_of_it() -> None:
    distributions = [f"nanovllm{part}" for part in ("", "-models", "-server", "-tokenizers", "-runner-http",
                     "-runner-numpy", "-runner-onnx", "-runner-torch")]  # fmt: skip
    needed = {Requirement(line).name for name in distributions for line in requires(name) or ()}
    assert {"numpy", "fastapi", "jinja2"} <= needed
    assert "transformers" not in needed


# ------------------------------------------------------------------------------------------------ the table


def test_every_test_is_in_the_security_page_and_every_name_there_exists() -> None:
    page = (REPO / "docs" / "security.md").read_text("utf-8")
    tests = {name for name in globals() if re.match(r"test_(CVE|Tile|Ollama|TorchScript)", name)}
    assert set(re.findall(r"test_(?:CVE|Tile|Ollama|TorchScript)\w+", page)) == tests


@needs_spec
def test_every_advisory_is_in_the_security_page() -> None:
    page = (REPO / "docs" / "security.md").read_text("utf-8")
    table = (SPEC / "faults-and-advisories.md").read_text("utf-8").partition("### 4.3")[2]
    ids = [i for row in re.findall(r"^\| (.*?) \|", table, re.M) for i in re.findall(r"[A-Z]{3,5}-[\w-]*\d[\w-]*", row)]
    assert len(ids) > 60
    assert [i for i in ids if i not in page] == []
