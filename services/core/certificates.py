"""How long the certificates last that a part uses, as figures for alerts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from opentelemetry.metrics import CallbackOptions, Meter, Observation

from services.core.tls import Identity

log = logging.getLogger(__name__)

DAYS_LEFT = "lingqu.certificate.days_left"
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Used:
    """A PEM file, by what it is for. `authorities`: it lasts as long as any of its certificates, since a new
    one stands beside the old one for a while; of a chain each is needed."""

    name: str
    path: Path
    authorities: bool = False

    def expires_s(self) -> float:
        """Seconds since 1970. Raises OSError, and ValueError for what is no certificate."""
        ends = [
            one.not_valid_after_utc.timestamp()
            for one in x509.load_pem_x509_certificates(self.path.read_bytes())
        ]
        return max(ends) if self.authorities else min(ends)


def of(identity: Identity | None) -> Iterator[Used]:
    """What a part shows to other parts, and by what it knows them."""
    if identity is not None:
        yield Used("mtls", identity.certificate)
        yield Used("mtls-ca", identity.ca, authorities=True)


class DaysLeft:
    """Of files, by name; below 0 when they are over. They are read when they have changed; one that cannot be
    read has no value."""

    def __init__(self, used: Iterable[Used], now_s: Callable[[], float] = time.time) -> None:
        self._used, self._now_s = tuple(used), now_s
        self._known: dict[str, tuple[int, float | None]] = {}

    def read(self) -> Mapping[str, float]:
        now = self._now_s()
        ends = {used.name: self._expires_s(used) for used in self._used}
        return {name: (end - now) / _DAY_S for name, end in ends.items() if end is not None}

    def _expires_s(self, used: Used) -> float | None:
        written = used.path.stat().st_mtime_ns if used.path.exists() else 0
        if used.name not in self._known or self._known[used.name][0] != written:
            self._known[used.name] = written, _expires_s(used)
        return self._known[used.name][1]


def tell_days_left(meter: Meter, used: Iterable[Used]) -> None:
    """A gauge of each file's days left, asked for whenever it is read."""
    days_left = DaysLeft(used)

    def observed(options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(days, {"certificate": name}) for name, days in days_left.read().items()]

    meter.create_observable_gauge(DAYS_LEFT, [observed], "d", "Days until a certificate in use expires")


def _expires_s(file: Used) -> float | None:
    try:
        return file.expires_s()
    except (OSError, ValueError) as err:
        log.warning("nobody knows how long the certificate %s lasts: %s: %s", file.name, file.path, err)
        return None
