"""Serving a runner over HTTP: `nanovllm runner-serve`. The command is in cli.py; importing this loads nothing."""
