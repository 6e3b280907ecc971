"""The figures of docs/benchmarks.md. Every figure is a ratio against a reference measured in the same run."""
