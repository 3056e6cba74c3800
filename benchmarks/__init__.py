"""The project's benchmarks: `python -m benchmarks --help` teaches, `benchmarks/results/` holds what was measured."""
