"""What the core brings itself, with no plugin installed: the mock runner and the SimpleBPE tokenizer."""
