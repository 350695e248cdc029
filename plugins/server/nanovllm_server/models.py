"""GET /v1/models: the one model that is here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ApiError
from .openai_answers import ModelAnswer, ModelsAnswer
from .openapi import Operation
from .routing import as_json, get

if TYPE_CHECKING:
    from fastapi import Request, Response
    from starlette.routing import BaseRoute

    from .state import State

OPERATIONS = (
    Operation(method="get", path="/v1/models", summary="The model that is here", answer=ModelsAnswer),
    Operation(
        method="get",
        path="/v1/models/{name}",
        summary="One model",
        answer=ModelAnswer,
        statuses={404: "no such model"},
    ),
)


def routes(state: State) -> list[BaseRoute]:
    def model() -> dict[str, Any]:
        return {
            "id": state.model_name,
            "object": "model",
            "created": state.created,
            "owned_by": "nanovllm",
            "max_model_len": state.llm.engine.max_len,  # prompt and answer, in tokens; vLLM's name for it
        }

    async def models(http: Request) -> Response:
        return as_json({"object": "list", "data": [model()]})

    async def one(http: Request) -> Response:
        if http.path_params["name"] != state.model_name:
            raise ApiError(404, "there is no such model here", param="model", code="model_not_found")
        return as_json(model())

    return [get("/v1/models", models), get("/v1/models/{name}", one)]
