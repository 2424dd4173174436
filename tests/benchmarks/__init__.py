"""How fast the library is, next to torch and ncut-pytorch: `python -m tests.benchmarks`, not part of the tests."""
