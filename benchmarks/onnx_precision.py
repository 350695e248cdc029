"""What each precision of the ONNX runner costs in accuracy, as a Markdown table.

    python benchmarks/onnx_precision.py MODEL... [--sequences 8] [--tokens 128] [--seed 0] [--threads 2]

MODEL is a checkpoint's directory. `precision.py` says what the columns are and what text they are measured on.
"""

from __future__ import annotations

from precision import compare

PRECISIONS = {
    "fp32": {"type": "onnx", "weights": "fp32"},
    "int8": {"type": "onnx", "weights": "int8"},
    "int4, block 32": {"type": "onnx", "weights": "int4", "int4_block": 32},
    "int4, block 128": {"type": "onnx", "weights": "int4", "int4_block": 128},
}


def main() -> None:
    compare(__doc__ or "", PRECISIONS)


if __name__ == "__main__":
    main()
