"""One file per model family, all in the same order, so that they diff.

A family is a module (entry point of the group `nanovllm.models`, named after the model_type) with

    PREFIX       what a causal-LM checkpoint puts before every base-model name; files saved from the
                 base model lack it, and both are read
    LAYOUT       file module -> canonical module, or a tuple of canonical modules whose rows lie one
                 after another in it; `{i}` is the layer; `.weight` and `.bias` are appended
    TRANSPOSED   the file modules whose weight is stored (in, out)
    IGNORED      a regular expression for file names (without PREFIX) that hold no weight
    spec(config) the DecoderSpec; reads every key it implements, refuses what it does not

Weights, splits, transposes and ties are data; no family touches a tensor.
"""
