"""Benchmarks: cases, their measurement, the ledger, and verdicts from replicated processes. See docs/benchmarks.md.

Nothing here imports typer or rich but `command`: a GPU machine needs torch, Megatron and pytest alone.
"""
