"""Weights of Wan models: reading, converting, saving."""
