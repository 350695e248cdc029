"""Other people's TorchScript and torch.export models: a `Decoder` for `nanovllm_models.lanes`.

| file | what it does |
|---|---|
| `signature.py` | what the arguments of a model mean, and how they are put together |
| `decoder.py` | one run of the model, in these terms |
| `script.py` | a TorchScript archive: its schema, and the shapes that it does not say |
| `exported.py` | a torch.export archive, which says all of it |
| `runner.py` | from an archive and the files beside it to a runner |
"""
