"""Offline work on models: from a checkpoint to an artifact that can be published."""
