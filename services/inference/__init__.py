"""The inference service: the text API, and the agent of the Triton beside it."""
