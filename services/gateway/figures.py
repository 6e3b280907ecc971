"""What the control plane counts: what data planes refuse, for alerts, and how many requests ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from opentelemetry.metrics import CallbackOptions, Meter, NoOpMeterProvider, Observation

from services.gateway.breakers import Load, VersionId

REQUESTS = "lingqu.gateway.requests"
NACKS = "lingqu.gateway.nacks"
REFUSED = "lingqu.gateway.refused"
DATA_PLANES = "lingqu.gateway.data_planes"
CLIENTS = "lingqu.gateway.clients"
BEHIND = "lingqu.gateway.data_planes.behind"

GAUGES = {
    REFUSED: ("{resource}", "Models and extensions whose newest configuration is held back"),
    DATA_PLANES: ("{data plane}", "Envoys connected to this control plane"),
    CLIENTS: ("{client}", "gRPC clients that balance by themselves, connected to this control plane"),
    BEHIND: ("{data plane}", "Of these, Envoys that have not accepted the newest configuration"),
}


class Figures:
    """Counters since the start, and gauges asked when they are read."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._nacks: Counter[str] = Counter()
        self._gauges: dict[str, Callable[[], float]] = {}
        meter = meter or NoOpMeterProvider().get_meter("")
        meter.create_observable_counter(
            NACKS, [self._observed_nacks], "{response}", "Configurations that Envoys have refused, by kind"
        )
        self._requests = meter.create_counter(
            REQUESTS,
            "{request}",
            "Requests that replicas have answered, by model, version and outcome",
        )
        for name, (unit, text) in GAUGES.items():
            meter.create_observable_gauge(name, [self._observer(name)], unit, text)

    @property
    def nacks(self) -> Mapping[str, int]:
        """By the kind of the resource."""
        return dict(self._nacks)

    def nack(self, kind: str) -> None:
        self._nacks[kind] += 1

    def answered(self, loads: Mapping[VersionId, Load]) -> None:
        """What Envoys have reported since: every request, however few of them are told one by one."""
        for (model, version), load in loads.items():
            for outcome, number in (("ok", load.ended - load.failed), ("failed", load.failed)):
                if number:
                    self._requests.add(number, {"model": model, "version": str(version), "outcome": outcome})

    def gauge(self, name: str, value: Callable[[], float]) -> None:
        """Ask `value` for the gauge whenever it is read, from whatever thread."""
        self._gauges[name] = value

    def _observed_nacks(self, options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(count, {"kind": kind}) for kind, count in self.nacks.items()]

    def _observer(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observed(options: CallbackOptions) -> Iterable[Observation]:
            ask = self._gauges.get(name)
            return [] if ask is None else [Observation(ask())]

        return observed
