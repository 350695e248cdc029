"""`python -m nanovllm` is `nanovllm`."""

from .cli import main

main()
