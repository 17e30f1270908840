"""Tuning a Wan model to an attention method, on a folder of videos with captions."""
