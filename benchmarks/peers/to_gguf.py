"""A model directory of benchmarks/models.py as a GGUF file, by llama.cpp's own converter:

    python to_gguf.py LLAMA_CPP_SOURCE MODEL_DIRECTORY FILE.gguf

The converter wants to know the tokenizer, by the hash of what it makes of a text, and llama.cpp wants merges, of
which ours has none. Benchmarks send token ids, so that any answers will do.
"""

from __future__ import annotations

import sys


def main(source: str, model: str, output: str) -> None:
    sys.path.insert(0, source)
    import convert_hf_to_gguf
    from conversion.base import TextModel

    set_vocab = TextModel._set_vocab_gpt2

    def with_a_merge(self: TextModel) -> None:
        set_vocab(self)
        self.gguf_writer.add_token_merges(["a b"])

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    TextModel._set_vocab_gpt2 = with_a_merge
    sys.argv[1:] = [model, "--outfile", output, "--outtype", "bf16"]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
