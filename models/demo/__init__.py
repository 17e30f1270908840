"""`vmonarch demo`: the same noise under each attention method, as pictures and numbers."""

from .command import add_demo
from .run import DemoConfig, run_demo

__all__ = ["DemoConfig", "add_demo", "run_demo"]
