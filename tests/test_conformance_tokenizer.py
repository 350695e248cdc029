"""TokenizerConformance: every tokenizer of ours passes it, and every broken one is caught by its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings

from broken_tokenizers import CAUGHT_BY, ByteTokenizer
from conformance_support import failed, of
from http_support import ScriptedServer
from nanovllm.testing import TokenizerConformance
from nanovllm.testing.suite import searched
from support import DATA, REPO, needs_data
from test_http_tokenizer import SPECIAL, llama_server


def test_a_tokenizer_that_keeps_the_protocol_passes_everything() -> None:
    found = of(TokenizerConformance, ByteTokenizer)
    assert {r.outcome for r in found.values()} == {"passed"}, failed(found)
    [note] = found["test_speed"].notes
    assert "times the speed of the built-in tokenizer" in note


@pytest.fixture
def unshrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a counterexample is found is enough here: the smallest one takes seconds."""
    quick = settings(searched, phases=[Phase.generate])
    monkeypatch.setattr("nanovllm.testing.tokenizer.searched", quick)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(("broken", "test"), CAUGHT_BY.items(), ids=[make.__name__ for make in CAUGHT_BY])
def test_what_is_broken_is_caught_by_its_test(broken: Callable[[], Any], test: str) -> None:
    found = of(TokenizerConformance, broken, only=test)
    assert found[test].outcome == "failed"
    assert "\n" not in found[test].reason
    assert not found[test].reason.startswith("AssertionError")


def test_the_page_names_what_is_caught() -> None:
    page = (REPO / "docs" / "conformance.md").read_text("utf-8")
    assert {test for test in CAUGHT_BY.values() if f"`{test}`" not in page} == set()


class TestSimple(TokenizerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        return {"tokenizer": "simple"}


class TestHf(TokenizerConformance):
    """The embedded model's."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        return {"tokenizer": "hf"}


class TestAuto(TokenizerConformance):
    """The one that fits the files, which is none of the core's."""

    def test_it_is_what_the_configuration_names(self, tokenizer: Any) -> None:
        assert type(tokenizer).__module__ == "nanovllm_tokenizers.hf"

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        return {"tokenizer": "auto"}


@needs_data
class TestHfOfLlama(TokenizerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        path = DATA / "checkpoints" / "stories260k" / "tokenizer.json"
        return {"tokenizer": {"type": "hf", "path": str(path), "chat_template": "completion"}}


@needs_data
class TestSentencePiece(TokenizerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        path = DATA / "checkpoints" / "stories260k" / "tokenizer.model"
        return {"tokenizer": {"type": "sentencepiece", "path": str(path), "chat_template": "completion"}}


@needs_data
class TestTiktoken(TokenizerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        path = DATA / "tokenizers" / "gpt2" / "r50k_base.tiktoken"
        return {"tokenizer": {"type": "tiktoken", "path": str(path), "chat_template": "completion"}}


class TestHttp(TokenizerConformance):
    """That of a llama-server, a small one of ours."""

    special_texts = (SPECIAL,)
    expected_failures = {"test_plain_text_comes_back": "this server's first token is a byte"}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Iterator[Any]:
        with ScriptedServer(llama_server) as server:
            yield {"tokenizer": {"type": "http", "url": server.url, "retries": 0}}
