"""Trials in a file, so that a restart of the service asks nothing twice: evidence that begins anew would be
one more chance of a false alarm. Which texts were compared is forgotten, and what had not become a block."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.core.errors import LingquError
from services.core.files import write_whole
from services.metrics.verdicts.answers import Kind
from services.metrics.verdicts.evidence import Excess, Mean, Mixture, Tally
from services.metrics.verdicts.trial import Side, Terms, Trial

log = logging.getLogger(__name__)


class Archive:
    """Calls block, and come one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Trial]:
        """By id of the rollout. A file that cannot be read is set aside as `NAME.corrupt`."""
        try:
            return {raw["rollout"]: _restored(raw) for raw in json.loads(self._path.read_bytes())}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            aside = self._path.with_name(f"{self._path.name}.corrupt")
            log.error("%s cannot be read, and is set aside as %s: %r", self._path, aside.name, err)  # noqa: TRY400
        try:
            self._path.replace(aside)
        except OSError:
            log.exception("%s cannot be set aside", self._path)
        return {}

    def keep(self, trials: Iterable[dict[str, Any]]) -> None:
        """Each as `plain` has it. Raises LingquError."""
        try:
            write_whole(self._path, json.dumps(list(trials)).encode(), 0o600)
        except OSError as err:
            raise LingquError(f"{self._path} cannot be written: {err.strerror}") from err


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
