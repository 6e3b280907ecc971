"""The code that runs inside Triton's Python backend. It may use numpy and an engine, but not gRPC."""
