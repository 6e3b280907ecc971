"""Verdicts on rollouts: whether a version does worse than the one that it is to replace."""
