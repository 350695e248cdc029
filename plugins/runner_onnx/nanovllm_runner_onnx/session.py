"""An ONNX Runtime session over a model and its weights: the device, threads, options. Knows no decoder.

The device is strict. ONNX Runtime quietly goes on with the CPU if a provider cannot be created, and
quietly gives the CPU what a provider has no kernel for; here the first is found before anything is
built (`settings_of`) and again in the loaded session, the second by asking which node went where.
Only `fallback: [cpu]` allows either, and then it is logged and among the runner's facts.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from nanovllm.errors import ConfigError, ModelError, PluginError
from nanovllm.threads import available_threads

from .install import import_onnxruntime, pip_line
from .options import LONG_NAMES, Device, OnnxOptions, Scalar
from .saturation import REMEDY, saturates
from .session_options import provider_options, session_options
from .weights import give_weights, let_go

if TYPE_CHECKING:
    import onnxruntime as ort  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

PROVIDERS = {device: long for long, device in LONG_NAMES.items()}

# What is slow where it does not belong. Arithmetic on shapes is not: providers leave that to the CPU on purpose.
HEAVY = frozenset(
    """MatMul Gemm FusedMatMul FusedGemm MatMulNBits MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul
    QLinearMatMul QGemm MatMulBnb4 Einsum Conv FusedConv ConvInteger LSTM GRU RNN MoE QMoE
    Attention MultiHeadAttention GroupQueryAttention PagedAttention SparseAttention DecoderMaskedMultiHeadAttention
    DecoderMaskedSelfAttention PackedAttention PackedMultiHeadAttention QAttention LinearAttention
    LayerNormalization SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization
    RMSNormalization RotaryEmbedding Softmax LogSoftmax Gelu FastGelu BiasGelu QuickGelu""".split()
)


DEFAULTS: Mapping[str, Scalar] = {
    "log_severity_level": 4,  # fatal ones: errors come back as exceptions, which say the same
    # Plans of memory are kept for every combination of input shapes, of which we have no end. DirectML has none.
    "enable_mem_pattern": False,
    # How long threads wait busily for work, in microseconds; what comes next within a step takes less. By itself
    # ONNX Runtime goes on for 16 to 50 ms, and several runners in one process then take the processors from each
    # other: three that step in turns, 2 threads on 2 processors, took 120 ms a step instead of 25. With one
    # runner there was no difference. Older versions than 1.27 do not know this; there, spinning: false.
    "session.intra_op.spin_duration_us": 200,
}


@dataclass(frozen=True, slots=True)
class SessionSettings:
    device: Device  # where the session runs: what was asked for, or what a fallback led to
    fallback: tuple[str, ...]  # () or ("cpu",)
    threads: int
    provider_options: Mapping[str, Scalar]
    session_options: Mapping[str, Scalar]
    spinning: bool
    custom_ops: tuple[Path, ...]
    fell_back: str | None = None  # why `device` is not the one that was asked for


def settings_of(options: OnnxOptions, threads: int | None) -> SessionSettings:
    """What the options come to on this machine; `threads` None = all that this process may use.

    Raises PluginError if ONNX Runtime is missing, too old or installed twice, ConfigError for a device that
    cannot be used and for options that nobody knows.
    """
    custom_ops = tuple(Path(name) for name in options.custom_ops)
    for path in custom_ops:
        if not path.is_file():
            raise ConfigError(f"runner.custom_ops names {path}, which is not a file", hint="name the library's file")
    settings = SessionSettings(
        device=options.device,
        fallback=tuple(options.fallback),
        threads=threads or available_threads(),
        provider_options=options.provider_options,
        session_options=options.session_options,
        spinning=options.spinning,
        custom_ops=custom_ops,
    )
    provider_options(settings.device, settings.provider_options)
    try:
        import_onnxruntime(settings.device)
        if settings.device != "cpu":
            _try_device(settings)
    except (ConfigError, PluginError) as e:
        if settings.device == "cpu" or "cpu" not in settings.fallback:
            raise
        import_onnxruntime("cpu")
        log.warning("%s; going on with the cpu, which runner.fallback allows", e.message)
        settings = replace(settings, device="cpu", provider_options={}, fell_back=e.message)
    session_options(settings.session_options)
    return settings


def open_session(
    model: bytes | Path, settings: SessionSettings, weights: Mapping[str, NDArray[Any]] | None = None
) -> ort.InferenceSession:
    """`weights`: arrays for the external initializers of a model that is given as bytes.

    Raises ModelError if ONNX Runtime refuses the model, ConfigError if it would run elsewhere than it should.
    """
    import onnxruntime as ort

    options = session_options({**DEFAULTS, **settings.session_options})
    options.intra_op_num_threads = settings.threads
    if not settings.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if settings.device == "cpu" and saturates(ort):
        options.add_session_config_entry(*REMEDY)
    if settings.device != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for library in settings.custom_ops:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as e:  # ONNX Runtime's exceptions share no base class of their own
            raise ConfigError(
                f"runner.custom_ops: {library} cannot be loaded ({e})",
                hint="it must be a library of operators built for this ONNX Runtime and this system",
            ) from e
    kept = give_weights(options, weights or {})
    provider = PROVIDERS[settings.device]
    source = model if isinstance(model, bytes) else str(model)
    try:
        chosen = [(provider, provider_options(settings.device, settings.provider_options))]
        session = ort.InferenceSession(source, options, providers=chosen, enable_fallback=0)
    except Exception as e:
        subject = "the graph" if isinstance(model, bytes) else str(model)
        reason = " ".join(str(e).split())  # in one line
        hint = "try it without runner.session_options" if settings.session_options else None
        raise ModelError(f"ONNX Runtime {ort.__version__} refuses {subject}: {reason}", hint=hint) from e
    session.weights = kept  # as long as it lives it reads them where they are
    let_go(kept)
    if session.get_providers()[0] != provider:
        raise ConfigError(
            f"ONNX Runtime runs on {', '.join(session.get_providers())} where {provider} was asked for",
            hint="it has just said on stderr what the provider lacks; install that, or set runner.device: cpu",
        )
    if settings.device != "cpu":
        _check_placement(session, settings)
    return session


def facts(settings: SessionSettings, session: ort.InferenceSession) -> dict[str, object]:
    """For a runner's description."""
    import onnxruntime as ort

    fell_back = {} if settings.fell_back is None else {"fallback": settings.fell_back}
    return {
        "onnxruntime": ort.__version__,
        "device": settings.device,
        **fell_back,
        "providers": session.get_providers(),
        "threads": settings.threads,
    }


def _check_placement(session: ort.InferenceSession, settings: SessionSettings) -> None:
    """Raises ConfigError naming the heavy nodes that the provider has no kernel for, unless the CPU is allowed."""
    strays = Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == PROVIDERS["cpu"]
        for node in part.get_nodes()
        if node.op_type in HEAVY
    )
    if not strays:
        return
    listed = ", ".join(f"{count} {kind}" for kind, count in strays.most_common())
    message = f"{settings.device} has no kernel for parts of this graph, which would run on the cpu: {listed}"
    if "cpu" not in settings.fallback:
        raise ConfigError(message, hint="set runner.device: cpu, or allow it with runner.fallback: [cpu]")
    log.warning("%s (runner.fallback allows it)", message)


def _try_device(settings: SessionSettings) -> None:
    """Raises ConfigError if no session can be had on the device. To be known before a graph is built for it."""
    import onnxruntime as ort

    installed = [LONG_NAMES[name] for name in ort.get_available_providers() if name in LONG_NAMES]
    if settings.device not in installed:
        raise ConfigError(
            f"runner.device is {settings.device}, which this ONNX Runtime {ort.__version__} does not have; "
            f"available: {', '.join(installed)}",
            hint=f"try: {pip_line(settings.device)}, or set runner.device to {installed[0]}",
        )
    if settings.device == "cuda" and hasattr(ort, "preload_dlls"):  # finds the libraries that pip has installed
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "smallest", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    try:
        open_session(model.SerializeToString(), replace(settings, fallback=()))
    except ModelError as e:
        raise ConfigError(
            f"runner.device is {settings.device}, on which no session can be had: {e.message}",
            hint=f"check the driver and libraries of {settings.device}, or set runner.device: cpu",
        ) from e
