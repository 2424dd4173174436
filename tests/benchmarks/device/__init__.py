"""The proof on an accelerator, in one command: `python -m tests.benchmarks.device`."""
