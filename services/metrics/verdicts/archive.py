"""Trials in a file, so that a restart of the service asks nothing twice: evidence that begins anew would be
one more chance of a false alarm. Which texts were compared is forgotten, and what had not become a block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.metrics import documents
from services.metrics.verdicts.answers import Kind
from services.metrics.verdicts.evidence import Excess, Mean, Mixture, Tally
from services.metrics.verdicts.trial import Side, Terms, Trial


class Archive:
    """Calls block, and come one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Trial]:
        """By id of the rollout."""
        nothing: dict[str, Trial] = {}
        return documents.read(self._path, _all_restored, nothing)

    def keep(self, trials: Iterable[dict[str, Any]]) -> None:
        """Each as `plain` has it. Raises LingquError."""
        documents.write(self._path, list(trials))


def plain(trial: Trial) -> dict[str, Any]:
    return {
        "rollout": trial.rollout,
        "model": trial.model,
        "version": trial.version,
        "before": trial.before,
        "terms": asdict(trial.terms),
        "step": trial.step,
        "step_samples": trial.step_samples,
        "incomparable": trial.incomparable,
        "errors": asdict(trial.errors),
        "copies": asdict(trial.copies),
        "slower": [asdict(trial.slower[quantile]) for quantile in sorted(trial.slower)],
        "differing": {str(kind): asdict(mean) for kind, mean in trial.differing.items()},
        "sides": {
            str(version): {"total": asdict(side.total), "latencies": list(side.latencies)}
            for version, side in trial.sides.items()
        },
    }


def _all_restored(body: Any) -> dict[str, Trial]:
    return {raw["rollout"]: _restored(raw) for raw in body}


def _restored(raw: Any) -> Trial:
    trial = Trial(raw["rollout"], raw["model"], raw["version"], raw["before"], Terms(**raw["terms"]))
    trial.step, trial.step_samples = int(raw["step"]), int(raw["step_samples"])
    trial.incomparable = int(raw["incomparable"])
    trial.errors, trial.copies = _excess(raw["errors"]), _excess(raw["copies"])
    trial.slower = {q: _excess(one) for q, one in zip(sorted(trial.slower), raw["slower"], strict=True)}
    trial.differing = {
        Kind(kind): Mean(**{**mean, "mixture": Mixture(**mean["mixture"])})
        for kind, mean in raw["differing"].items()
    }
    for version, kept in raw["sides"].items():
        side = Side(Tally(**kept["total"]))
        side.latencies.extend(map(float, kept["latencies"]))
        trial.sides[int(version)] = side
    return trial


def _excess(raw: Any) -> Excess:
    return Excess(
        raw["allowed"],
        raw["usual"],
        Mixture(**raw["mixture"]),
        Tally(**raw["before"]),
        Tally(**raw["after"]),
    )
