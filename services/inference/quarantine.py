"""Versions that keep killing their engine: after a few tries they are not loaded again, for their next try
would take the others' time, memory or Triton with it.

The strikes are kept in a file, because a version that takes the whole machine down takes this process along.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.core.discovery import Version, VersionKey

log = logging.getLogger(__name__)

STRIKES = 3
SOON_S = 600.0
"""A version that lived for as long after its load is not what brings its engine down at once."""
WINDOW_S = 3600.0


class Quarantine:
    """Strikes by version and artifact. `clock` is the wall clock: strikes outlive the process."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._loaded_at: dict[VersionKey, float] = {}
        self._strikes: dict[str, list[tuple[float, str]]] = _read(file)

    def loading(self, version: Version) -> str | None:
        """Told that a load is to begin: why it must not; None if it may."""
        strikes = self._strikes.get(_name(version), [])
        if len(strikes) >= STRIKES:
            return (
                f"quarantined: it brought its engine down {len(strikes)} times, each within "
                f"{SOON_S / 60:.0f} min of its load (last: {strikes[-1][1]}); retire and restore the "
                f"version, or start inference with LINGQU_FORGET_QUARANTINE=true, to have it tried again"
            )
        self._loaded_at[version.key] = self._clock()
        return None

    def strike(self, version: Version, why: str) -> None:
        """Its engine died or hung, or Triton did while it was loaded."""
        now = self._clock()
        kept = [s for s in self._strikes.get(_name(version), []) if now - s[0] < WINDOW_S]
        if now - self._loaded_at.get(version.key, now) >= SOON_S:
            kept = []
        else:
            kept.append((now, why))
        log.warning("%s: %s (%d of %d)", version.key, why, len(kept), STRIKES)
        self._strikes[_name(version)] = kept
        self._write()

    def forget(self, key: VersionKey) -> None:
        """Its record was taken off line, or it is not wanted any more: it may be tried anew."""
        mine = [name for name in self._strikes if name.startswith(f"{key.model} {key.version} ")]
        for name in mine:
            del self._strikes[name]
        if mine:
            self._write()

    def forget_all(self) -> None:
        self._strikes.clear()
        self._file.unlink(missing_ok=True)

    def _write(self) -> None:
        partial = self._file.with_suffix(".tmp")
        try:
            partial.write_text(json.dumps(self._strikes, indent=1))
            partial.replace(self._file)
        except OSError as err:  # a full disk must not end the agent
            log.warning("the strikes cannot be kept in %s: %s", self._file, err)


def _name(version: Version) -> str:
    """Another artifact under the same number is another version: of a registry that was made anew."""
    return f"{version.key.model} {version.key.version} {version.sha256}"


def _read(file: Path) -> dict[str, list[tuple[float, str]]]:
    try:
        body: Any = json.loads(file.read_text())
        return {str(name): [(float(at), str(why)) for at, why in strikes] for name, strikes in body.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as err:
        log.warning("%s is of no use (%s); nothing is quarantined", file, err)
        return {}
