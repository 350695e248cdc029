"""Comparing configurations: the same prompts through each, and the stage at fault where tokens differ.

    prompts.py     what is asked: built in, from the command line, from a file
    encode.py      a prompt to ids, with each plain text in it: what the first two stages are judged by
    record.py      the logits of every token that was drawn, as the sampler saw them
    run.py         one configuration's answers, as a value; it is loaded only for that long
    scores.py      what is known of the distribution over the next token, and how far apart two of them are
    stages.py      the stages, and what two tokenizers differ in: docs/compare.md is the definition
    pair.py        two answers to the name of the stage at fault
    perplexity.py  how well a configuration predicts a text, and the difference of two
    comparison.py  all configurations against the first
    show.py        comparisons as tables, sentences and JSON

Nothing here knows a runtime, and nothing here is imported by the rest of the core.
"""
