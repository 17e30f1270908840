"""Measurements: `python -m benchmarks.attention`, `.memory`, `.fidelity`, from the repository."""
