"""The user's `session_options` and `provider_options`, checked by name: ONNX Runtime ignores what it does not know.

Attributes of SessionOptions are taken from the installed version. Keys of its configuration and options of
providers cannot be asked for; here are those of version 1.31.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ConfigError

from .options import Device, Scalar

if TYPE_CHECKING:
    import onnxruntime as ort  # type: ignore[import-untyped]

OURS = {
    "intra_op_num_threads": "runner.threads",
    "use_per_session_threads": "runner.threads",
    "session.intra_op.allow_spinning": "runner.spinning",
    "session.inter_op.allow_spinning": "runner.spinning",
}
KEYS = frozenset(
    """session.allow_released_opsets_only session.collect_node_memory_stats_to_file session.debug_layout_transformation
    session.disable_aot_function_inlining session.disable_cpu_ep_fallback session.disable_double_qdq_remover
    session.disable_prepacking session.disable_qdq_constant_folding session.disable_quant_qdq
    session.dynamic_block_base session.enable_dq_matmulnbits_fusion session.enable_quant_qdq_cleanup
    session.force_spinning_stop session.function_expansion_byte_limit session.function_expansion_node_limit
    session.gqa_value_layout session.graph_optimizations_loop_level session.inter_op.spin_backoff_max
    session.inter_op.spin_duration_us session.intra_op.spin_backoff_max session.intra_op.spin_duration_us
    session.intra_op_thread_affinities session.max_shape_override
    session.optimized_model_external_initializers_file_name
    session.optimized_model_external_initializers_min_size_in_bytes session.prepack.enable_parallel
    session.qdq_matmulnbits_accuracy_level session.qdq_matmulnbits_block_size session.qdqisint8allowed
    session.save_external_prepacked_constant_initializers session.set_denormal_as_zero
    session.strict_shape_type_inference session.strict_workspace_verification
    session.use_device_allocator_for_initializers session.use_env_allocators
    optimization.constant_folding_max_output_size_in_bytes optimization.disable_specified_optimizers
    optimization.enable_cast_chain_elimination optimization.enable_gelu_approximation
    mlas.disable_kleidiai mlas.kleidiai.conv_igemm_max_work mlas.nchwc_depthwise_sliding
    mlas.nchwc_pointwise_conv_max_input_channel_batch mlas.qnbit.force_fp32 mlas.use_lut_gemm
    ep.cuda.fpa_intb_gemm ep.cuda.fpa_intb_profile_m ep.cuda.gqa_workspace_max_total_sequence_length""".split()
)
PROVIDER_OPTIONS: dict[Device, frozenset[str]] = {
    "cpu": frozenset(),
    "cuda": frozenset(
        """device_id arena_extend_strategy cudnn_conv1d_pad_to_nc1d cudnn_conv_algo_search cudnn_conv_use_max_workspace
        do_copy_in_default_stream enable_cuda_graph enable_skip_layer_norm_strict_mode fuse_conv_bias gpu_mem_limit
        prefer_nhwc sdpa_kernel tunable_op_enable tunable_op_max_tuning_duration_ms tunable_op_tuning_enable
        use_ep_level_unified_stream use_tf32""".split()
    ),
    "directml": frozenset("device_id device_filter disable_metacommands performance_preference".split()),
}


def session_options(wanted: Mapping[str, Scalar]) -> ort.SessionOptions:
    """SessionOptions with what is wanted set. Raises ConfigError for a name or a value that it does not know."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    attributes = {name for name in dir(options) if name[0] != "_" and not callable(getattr(options, name))}
    for name, value in wanted.items():
        if name in OURS:
            raise ConfigError(f"runner.session_options: {name} is set by {OURS[name]}", hint=f"use {OURS[name]}")
        if name in KEYS:
            options.add_session_config_entry(name, text(value))
            continue
        if name not in attributes:
            raise _unknown("session_options", name, (attributes | KEYS) - OURS.keys())
        try:
            setattr(options, name, _as_kind(getattr(options, name), value))
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(
                f"runner.session_options: {name} cannot be {value!r:.60}",
                hint=f"it is {_kind(getattr(options, name))}",
            ) from e
    return options


def provider_options(device: Device, wanted: Mapping[str, Scalar]) -> dict[str, str]:
    """As ONNX Runtime takes them. Raises ConfigError for a name that the device's provider does not know."""
    for name in wanted:
        if name not in PROVIDER_OPTIONS[device]:
            raise _unknown("provider_options", name, PROVIDER_OPTIONS[device], f" of {device}")
    return {name: text(value) for name, value in wanted.items()}


def text(value: Scalar) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _as_kind(current: Any, value: Scalar) -> Any:
    """`value` as the kind of thing that the attribute holds; of an enumeration, its member of that name."""
    if hasattr(current, "__members__"):
        return _members(current)[str(value).lower()]
    if type(current) is not type(value):
        raise TypeError(f"not {type(current).__name__}")
    return value


def _members(enumeration: Any) -> dict[str, Any]:
    """ORT_ENABLE_ALL is called `all`, ORT_SEQUENTIAL `sequential`."""
    return {
        name.removeprefix("ORT_").removeprefix("ENABLE_").lower(): member
        for name, member in enumeration.__members__.items()
    }


def _kind(current: Any) -> str:
    if hasattr(current, "__members__"):
        return f"one of {', '.join(_members(current))}"
    return {bool: "true or false", int: "a whole number", str: "a text"}[type(current)]


def _unknown(section: str, name: str, known: Iterable[str], of: str = "") -> ConfigError:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"known: {', '.join(near or names)}" if names else "it has none"
    return ConfigError(f"runner.{section}: no option {name!r:.60}{of}", hint=hint)
