"""Other people's ONNX decoders under our continuous batching: a `Decoder` for `nanovllm_models.lanes`.

| file | what it does |
|---|---|
| `signature.py` | what the graph's inputs and outputs mean |
| `decoder.py` | one run of the session, in these terms |
| `shared_rows.py` | a way of keeping the past that only GroupQueryAttention can go |
| `ways.py` | which ways a graph may be tried in |
| `runner.py` | from a model's files to a runner |
"""
