"""What the kernels of CUDA and DirectML take, of the operators that our graphs use.

Written down from the tables "Operators implemented by CUDAExecutionProvider" and "... DmlExecutionProvider" in
docs/OperatorKernels.md of microsoft/onnxruntime (a version of autumn 2026; of PagedAttention, whose row there is
older, from the kernels' names in onnxruntime-gpu 1.31.1, and so of GatherBlockQuantized).
"""

from __future__ import annotations

F = "float float16"
INTS = "int16 int32 int64 int8 uint16 uint32 uint64 uint8"
FI = f"{F} {INTS}"
ANY = f"bool double {FI}"
CUDA_F = "bfloat16 double float float16"
CUDA_N = f"{CUDA_F} {INTS}"
CUDA_ANY = f"bool {CUDA_N}"

# A kernel that is listed for "16+" is that of the operator as of set 16, and no other: where the standard has a newer
# one in the graph's operator set, ONNX Runtime does not take it. Hence the one version beside each.
# (domain, operator) -> the operator set that the kernel implements, and the types by their names in the schema
Kernels = dict[tuple[str, str], tuple[int, dict[str, str]]]

CUDA: Kernels = {
    ("", "Add"): (14, {"T": CUDA_N}),
    ("", "Cast"): (21, {"T1": CUDA_ANY, "T2": CUDA_ANY}),
    ("", "Div"): (14, {"T": CUDA_N}),
    ("", "Flatten"): (13, {"T": CUDA_ANY}),
    ("", "Gather"): (13, {"T": CUDA_ANY, "Tind": "int32 int64"}),
    ("", "Gelu"): (20, {"T": CUDA_F}),
    ("", "Gemm"): (13, {"T": CUDA_F}),
    ("", "LayerNormalization"): (17, {"T": CUDA_F, "U": "float"}),
    ("", "Mul"): (14, {"T": CUDA_N}),
    ("", "Relu"): (14, {"T": CUDA_F}),
    ("", "Reshape"): (21, {"T": CUDA_ANY}),
    ("", "SimplifiedLayerNormalization"): (1, {"T": CUDA_F, "V": CUDA_F, "U": "double float"}),
    ("", "Slice"): (13, {"T": CUDA_ANY, "Tind": "int32 int64"}),
    ("", "Split"): (18, {"T": CUDA_ANY}),
    ("", "Squeeze"): (21, {"T": CUDA_ANY}),
    ("", "Tanh"): (13, {"T": CUDA_F}),
    ("", "Unsqueeze"): (21, {"T": CUDA_ANY}),
    ("com.microsoft", "GatherBlockQuantized"): (1, {"T1": "int4 uint4 uint8", "T2": CUDA_F, "Tind": "int32 int64"}),
    ("com.microsoft", "MatMulNBits"): (1, {"T1": "bfloat16 float float16", "T2": "uint8"}),
    ("com.microsoft", "PagedAttention"): (1, {"T": "bfloat16 float16", "T_CACHE": "bfloat16 float16", "S": "int32"}),
    ("com.microsoft", "QuickGelu"): (1, {"T": CUDA_F}),
    ("com.microsoft", "RotaryEmbedding"): (1, {"T": "bfloat16 float float16", "M": "int64"}),
}

DIRECTML: Kernels = {
    ("", "Add"): (14, {"T": FI}),
    ("", "And"): (7, {"T": "bool"}),
    ("", "Cast"): (13, {"T1": ANY, "T2": ANY}),
    ("", "Concat"): (13, {"T": ANY}),
    ("", "Div"): (14, {"T": FI}),
    ("", "Flatten"): (13, {"T": ANY}),
    ("", "Gather"): (13, {"T": ANY, "Tind": "int32 int64"}),
    ("", "Gemm"): (13, {"T": F}),
    ("", "Greater"): (13, {"T": FI}),
    ("", "Identity"): (16, {"V": ANY}),
    ("", "LayerNormalization"): (17, {"T": F, "U": "float"}),
    ("", "LessOrEqual"): (16, {"T": FI}),
    ("", "MatMul"): (13, {"T": F}),
    ("", "Min"): (13, {"T": FI}),
    ("", "Mul"): (14, {"T": FI}),
    ("", "Range"): (11, {"T": "float int16 int32 int64"}),
    ("", "Relu"): (14, {"T": f"{F} int16 int32 int8"}),
    ("", "Reshape"): (14, {"T": ANY}),
    ("", "ScatterND"): (16, {"T": ANY}),
    ("", "Shape"): (15, {"T": ANY}),
    ("", "SimplifiedLayerNormalization"): (1, {"T": F, "V": F, "U": F}),
    ("", "Size"): (13, {"T": ANY}),
    ("", "Softmax"): (13, {"T": F}),
    ("", "Split"): (13, {"T": ANY}),
    ("", "Squeeze"): (13, {"T": ANY}),
    ("", "Sub"): (14, {"T": FI}),
    ("", "Tanh"): (13, {"T": F}),
    ("", "Transpose"): (13, {"T": ANY}),
    ("", "Unsqueeze"): (13, {"T": ANY}),
    ("", "Where"): (16, {"T": ANY}),
    ("com.microsoft", "FastGelu"): (1, {"T": F}),
    ("com.microsoft", "FusedMatMul"): (1, {"T": F}),
    ("com.microsoft", "Gelu"): (1, {"T": F}),
    ("com.microsoft", "MatMulNBits"): (1, {"T1": F, "T2": "uint8"}),
    ("com.microsoft", "QuickGelu"): (1, {"T": F}),
    ("com.microsoft", "RotaryEmbedding"): (1, {"T": F, "M": "int64"}),
}
KERNELS = {"cuda": CUDA, "directml": DIRECTML}
