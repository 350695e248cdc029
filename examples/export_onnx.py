"""Export the embedded model to ONNX with int8 weights, and ask what was exported. Prints how long each part takes.

pip install 'nanovllm[onnx]'
python examples/export_onnx.py
"""

import tempfile
import time
from pathlib import Path

from nanovllm import LLM, SamplingParams
from nanovllm_runner_onnx import export


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        path = export("demo", Path(directory) / "demo-int8", weights="int8")
        exported = time.perf_counter()
        print(f"exported in {exported - start:.2f} s: {', '.join(sorted(p.name for p in path.iterdir()))}")
        with LLM(str(path), runner="onnx") as llm:
            print(f"loaded in {time.perf_counter() - exported:.2f} s")
            question = [{"role": "user", "content": "What is the capital of Portugal?"}]
            [output] = llm.chat([question], SamplingParams(temperature=0))
        print(output.text)


if __name__ == "__main__":
    main()
