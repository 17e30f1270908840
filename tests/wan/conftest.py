"""Tests against the reference libraries run where these are installed: `make parity`."""

import importlib.util

# Nothing that could be skipped unnoticed: without torch these files are no part of the suite.
collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["*_parity.py"]
