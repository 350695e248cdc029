"""What each precision of the torch runner costs in accuracy on a CPU, as a Markdown table.

    python benchmarks/torch_precision.py MODEL... [--sequences 8] [--tokens 128] [--seed 0] [--threads 2]

MODEL is a checkpoint's directory. `precision.py` says what the columns are and what text they are measured on.
int8 is measured twice: with everything else in fp32, and in bf16, as `dtype: auto` chooses it where it can.
"""

from __future__ import annotations

from precision import compare

PRECISIONS = {
    "fp32": {"type": "torch", "device": "cpu", "dtype": "fp32"},
    "bf16": {"type": "torch", "device": "cpu", "dtype": "bf16"},
    "int8 and fp32": {"type": "torch", "device": "cpu", "dtype": "fp32", "weights": "int8"},
    "int8 and bf16": {"type": "torch", "device": "cpu", "dtype": "bf16", "weights": "int8"},
}


def main() -> None:
    compare(__doc__ or "", PRECISIONS)


if __name__ == "__main__":
    main()
