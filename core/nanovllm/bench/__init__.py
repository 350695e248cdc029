"""Measuring engines: what `nanovllm bench` and the scripts in benchmarks/ are made of.

    workload.py  what is asked: prompts as token ids, and how many tokens each must give
    metrics.py   the three figures (prefill, decode, throughput) of anything that can generate
    engine.py    one of our engines under measurement: latencies, the engine's own time, KV use
    memory.py    how much memory this process holds
    machine.py   which machine this is, and how fast its memory reads at the moment
    report.py    one engine's figures as a value, and how they are taken
    worker.py    the child's end of a comparison: an engine behind two pipes
    child.py     the parent's end of the same pipes
    compare.py   engines in turns, A B B A, and their ratios
    tables.py    tables, for terminals and as Markdown
    show.py      reports and comparisons as such tables
    plot.py      latencies as SVG
    trace.py     what an engine did, step by step, as a trace for Perfetto

Nothing here is imported by the rest of the core.
"""
