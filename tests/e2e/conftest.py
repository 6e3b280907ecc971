"""What several end-to-end tests need, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.classifier import package_classifier
from pipeline.package import Package
from tests import checkpoints


@pytest.fixture(scope="session")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.sentiment(tmp_path_factory.mktemp("checkpoint") / "sentiment")


@pytest.fixture(scope="session")
def classifier(sentiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package_classifier(sentiment, tmp_path_factory.mktemp("store"))
