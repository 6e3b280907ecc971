"""Lingqu: serve language models with gRPC. `lingqu.Client` talks to a suite; `lingqu --help` runs one."""

from lingqu.client import Client, LingquError

__all__ = ["Client", "LingquError"]
__version__ = "0.1.0"
