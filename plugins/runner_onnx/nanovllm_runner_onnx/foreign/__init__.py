"""Other people's ONNX decoders under our continuous batching.

| file | what it does |
|---|---|
| `signature.py` | what the graph's inputs and outputs mean |
| `decoder.py` | one run of the session, in these terms |
| `work.py` | what one sequence computes in a run; squaring off several |
| `past.py` | what a way of keeping the past between runs must do |
| `recomputed.py`, `grown.py`, `shared_rows.py` | the three ways |
| `probe.py` | which runs give the logits that each sequence has alone, found out by running them |
| `compose.py` | a step as few runs, none of which was not proven |
| `runner.py` | the engine's border around all of it |
"""
