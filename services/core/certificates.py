"""How long the certificates last that a part uses, as figures for alerts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
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


def tell_days_left(meter: Meter, used: Iterable[Used], now_s: Callable[[], float] = time.time) -> None:
    """A gauge of each file's days left, below 0 when they are over. Files are read when they have changed,
    whoever asks; one that cannot be read has no value."""
    files = tuple(used)
    known: dict[str, tuple[int, float | None]] = {}

    def expires_s(file: Used) -> float | None:
        written = file.path.stat().st_mtime_ns if file.path.exists() else 0
        if file.name not in known or known[file.name][0] != written:
            known[file.name] = written, _expires_s(file)
        return known[file.name][1]

    def observed(options: CallbackOptions) -> Iterable[Observation]:
        for file in files:
            if (end := expires_s(file)) is not None:
                yield Observation((end - now_s()) / _DAY_S, {"certificate": file.name})

    if files:
        meter.create_observable_gauge(DAYS_LEFT, [observed], "d", "Days until a certificate in use expires")


def _expires_s(file: Used) -> float | None:
    try:
        return file.expires_s()
    except (OSError, ValueError) as err:
        log.warning("nobody knows how long the certificate %s lasts: %s: %s", file.name, file.path, err)
        return None
