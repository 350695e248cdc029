"""Other people's decoder graphs under continuous batching, whatever runtime computes them: `Lanes`.

| file | what it does |
|---|---|
| `past.py` | a tensor of the past: its shape, type and bytes; inputs that say that a graph is something else |
| `decoder.py` | what a runtime has to offer: one run of a graph, and packing rows of the past |
| `work.py` | what one sequence computes in a run; squaring off several |
| `keeper.py` | what a way of keeping the past between runs must do |
| `recomputed.py`, `grown.py` | the two ways that need nothing special of a graph |
| `probe.py` | which runs give the logits that each sequence has alone, found out by running them |
| `compose.py` | a step as few runs, none of which was not proven |
| `runner.py` | the engine's border around all of it |

No runtime is imported here. `nanovllm-runner-onnx` and `nanovllm-runner-torch` bring a `Decoder` each.
"""

from .decoder import Decoder, Index, Moves, are_logits, hand_out
from .keeper import PastKeeper, Way, plain_ways
from .past import NUMBER_TYPES, REFUSED_INPUTS, Past
from .probe import Proven, look, probe
from .runner import LanesRunner, sequence_len
from .work import Side, Square, Work, fits, square

__all__ = [
    "NUMBER_TYPES",
    "REFUSED_INPUTS",
    "Decoder",
    "Index",
    "LanesRunner",
    "Moves",
    "Past",
    "PastKeeper",
    "Proven",
    "Side",
    "Square",
    "Way",
    "Work",
    "are_logits",
    "fits",
    "hand_out",
    "look",
    "plain_ways",
    "probe",
    "sequence_len",
    "square",
]
