"""What the registry tells of itself, for alerts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opentelemetry.metrics import CallbackOptions, Meter, Observation

STALE = "lingqu.registry.stale"


def observe(meter: Meter, stale: Callable[[], bool]) -> None:
    """Ask `stale` whenever the figure is read, from whatever thread."""

    def observed(options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(float(stale()))]

    meter.create_observable_gauge(STALE, [observed], "1", "1 while etcd is away and old records are served")
