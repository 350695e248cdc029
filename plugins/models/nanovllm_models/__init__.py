"""Models as data: a checkpoint directory -> what the decoder is, and its weights under one set of names.

No runtime here: `nanovllm-runner-numpy` interprets the result, `nanovllm-runner-onnx` builds a graph from it.
"""

from .alibi import alibi_bias
from .checkpoint import Checkpoint, load_checkpoint
from .config import Config
from .generation import Default
from .model_info import ModelInfo
from .positions import Alibi, DynamicNTK, Linear, Llama3, LongRope, Rotary, Yarn
from .registry import Family, known_architectures, refused_architectures
from .rope import rotary_frequencies
from .sizing import model_len, num_kv_blocks
from .spec import ACTIVATIONS, Attention, Block, DecoderSpec, Experts, FeedForward, Norm
from .weights_file import Tensor, open_weights

__all__ = [
    "ACTIVATIONS",
    "Alibi",
    "Attention",
    "Block",
    "Checkpoint",
    "Config",
    "DecoderSpec",
    "Default",
    "DynamicNTK",
    "Experts",
    "Family",
    "FeedForward",
    "Linear",
    "Llama3",
    "LongRope",
    "ModelInfo",
    "Norm",
    "Rotary",
    "Tensor",
    "Yarn",
    "alibi_bias",
    "known_architectures",
    "load_checkpoint",
    "model_len",
    "num_kv_blocks",
    "open_weights",
    "refused_architectures",
    "rotary_frequencies",
]
