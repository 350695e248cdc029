"""One file per model family, all in the same order, so that they diff.

A family is a module (entry point of the group `nanovllm.models`, named after the model_type) with

    PREFIX       what a causal-LM checkpoint puts before every base-model name; files saved from the
                 base model lack it, and both are read
    LAYOUT       file module -> canonical module, or a tuple of canonical modules whose rows lie one
                 after another in it; `{i}` is the layer, `{e}` the expert; `.weight` and `.bias` are
                 appended. `{e}` on the right side only: one tensor (experts, rows, in) holds them all.
                 Of several file modules for the same canonical ones, a file has any one
    TRANSPOSED   the file modules whose weight is stored (in, out)
    GROUPED      the fused file modules whose rows lie in num_kv_heads equal groups, each with its
                 share of every part: (q, k, v of the first kv head | q, k, v of the second | ...)
    IGNORED      a regular expression for file names (without PREFIX) that hold no weight
    spec(config) the DecoderSpec; reads every key it implements, refuses what it does not

Weights, splits, transposes and ties are data; no family touches a tensor. `refused.py` names the
architectures that are known and not implemented, with the reason.
"""
