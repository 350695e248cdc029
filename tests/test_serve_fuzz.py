"""The server against its own OpenAPI document: schemathesis makes calls by it, good ones and bad ones, and judges the
answers. Whatever is sent, another request's tokens stay the same and the engine lives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs  # schemathesis brings it
import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from nanovllm import __version__
from nanovllm.builtin.mock import MockRunner
from nanovllm_server.app import ROUTES
from nanovllm_server.keys import Keys
from nanovllm_server.openapi import document
from serve_support import Served, Witness, serving, witnessing

KEY = "a-key-of-the-tests"
BEARER = {"Authorization": f"Bearer {KEY}"}
DOCUMENT = document(__version__, [operation for module in ROUTES for operation in module.OPERATIONS])
# A valid body may still be refused: of the model, not of the schema, are the vocabulary, the lengths and the name.
NOT_JUDGED = [positive_data_acceptance, negative_data_rejection]
OPERATIONS = {found.ok().label: found.ok() for found in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(MockRunner(max_model_len=96), keys=Keys([KEY])) as server:
        yield server


@pytest.fixture(scope="module")
def witness(server: Served) -> Iterator[Witness]:
    with witnessing(server, **BEARER) as witness:
        yield witness


def without_nulls(value: Any) -> Any:
    """Null is a way to give nothing."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label, operation in OPERATIONS.items()
        for mode in GenerationMode
        # There is nothing about an open GET that could be wrong.
        if mode is GenerationMode.POSITIVE or "security" in operation.definition.raw
    ],
)
def test_every_answer_is_one_that_the_document_names(
    server: Served, witness: Witness, label: str, mode: GenerationMode
) -> None:
    operation = OPERATIONS[label]
    described = operation.definition.raw
    body = described.get("requestBody", {"content": {"application/json": {"schema": {}}}})
    good = jsonschema_rs.validator_for(
        {**body["content"]["application/json"]["schema"], "components": DOCUMENT["components"]}
    )

    @given(call=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=settings().max_examples // 5)
    def answers(call: schemathesis.Case) -> None:
        response = call.call(base_url=server.url, headers=BEARER, timeout=20)
        call.validate_response(response, headers=BEARER, excluded_checks=NOT_JUDGED)
        if response.status_code == 200 and response.request.body:
            assert good.is_valid(without_nulls(json.loads(response.request.body)))

    with witness.undisturbed():
        answers()
    assert server.llm.health().is_live
