"""The kernels: one folder each, beside its oracle."""
