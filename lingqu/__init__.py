"""Lingqu: serve language models with gRPC. `lingqu.Client` talks to a suite; `lingqu --help` runs one."""

from lingqu import publishing
from lingqu.client import Client, LingquError

__all__ = ["Client", "LingquError", "publishing"]
__version__ = "0.1.0"
