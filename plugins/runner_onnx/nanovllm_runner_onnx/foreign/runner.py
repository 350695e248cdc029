"""`ForeignRunner`: from somebody else's ONNX graph and the files beside it to a runner of lanes."""

from __future__ import annotations

from nanovllm.errors import ConfigError
from nanovllm.hookspecs import Context
from nanovllm_models.lanes import LanesRunner, probe, sequence_len

from ..model_files import OnnxModel
from ..session import SessionSettings, facts, open_session
from .decoder import ForeignDecoder
from .signature import read_signature
from .ways import ways_of


class ForeignRunner(LanesRunner):
    """Raises ModelError for a graph that cannot be used, ConfigError for what cannot be met."""

    def __init__(self, ctx: Context, model: OnnxModel, settings: SessionSettings) -> None:
        if ctx.options.weights is not None:
            raise ConfigError(
                f"runner.weights is {ctx.options.weights}, but {model.path.name} brings its own precision",
                hint="leave runner.weights out, or name the checkpoint that the graph was made from",
            )
        signature = read_signature(model.header, model.genai)
        session = open_session(model.path, settings)
        decoder = ForeignDecoder(session, signature, settings)
        description = {
            "graph": model.path.name,
            "style": signature.style,
            "weight_bytes": model.header.weight_bytes,
            **facts(settings, session),
        }
        ways = ways_of(decoder, model.header, sequence_len(model, ctx.max_model_len))
        super().__init__(ctx, decoder, ways, model, description)


def probe_model(model: OnnxModel, settings: SessionSettings) -> dict[str, object]:
    """What `nanovllm inspect` says of a graph: loads and probes it. Raises ModelError, ConfigError."""
    signature = read_signature(model.header, model.genai)
    decoder = ForeignDecoder(open_session(model.path, settings), signature, settings)
    return {"style": signature.style, **probe(decoder, ways_of(decoder, model.header, model.context_length)).facts}
