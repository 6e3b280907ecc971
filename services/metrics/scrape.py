"""Triton's own counters, out of the page for Prometheus on its port 8002."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator

from services.metrics.readings import Kind, Reading

TRITON = "triton"
TIMEOUT_S = 2.0
MAX_PAGE_BYTES = 4 << 20
# Families: the field, and what makes it ours (seconds).
_COUNTERS = {
    "nv_inference_request_success": ("requests", 1.0),
    "nv_inference_request_failure": ("failures", 1.0),
    "nv_inference_count": ("inferences", 1.0),
    "nv_inference_exec_count": ("executions", 1.0),
    "nv_inference_request_duration_us": ("request_seconds", 1e-6),
    "nv_inference_queue_duration_us": ("queue_seconds", 1e-6),
    "nv_inference_compute_infer_duration_us": ("compute_seconds", 1e-6),
}
_LEVELS = {"nv_inference_pending_request_count": ("pending", 1.0)}
_LINE = re.compile(r"^(nv_inference_\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Whatever proxy the environment names: this is a part of the suite.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(address: str) -> str:
    """Blocks for TIMEOUT_S at most. Raises OSError."""
    with _DIRECT.open(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
        return str(answer.read(MAX_PAGE_BYTES).decode(errors="replace"))


class Watched:
    """One Triton. A model that a page has and the page before had not has counted since then; what the first
    page has may have counted for long, which nobody knows."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._last_ns = 0
        self._starts: dict[tuple[str, str], int] = {}

    def readings(self, page: str) -> list[Reading]:
        found = []
        for reading in readings(page, self.address):
            key = reading.labels["model"], reading.labels["version"]
            start_ns = self._starts.setdefault(key, self._last_ns)
            found.append(reading._replace(start_ns=start_ns))
        there = _models(found)
        self._starts = {key: start for key, start in self._starts.items() if key in there}
        self._last_ns = time.time_ns()
        return found


def _models(found: list[Reading]) -> set[tuple[str, str]]:
    return {(reading.labels["model"], reading.labels["version"]) for reading in found}


def readings(page: str, address: str) -> Iterator[Reading]:
    """One of totals and one of levels for each version of a model."""
    totals: dict[tuple[str, str], dict[str, float]] = {}
    levels: dict[tuple[str, str], dict[str, float]] = {}
    for name, text, number in _LINE.findall(page):
        for families, found in ((_COUNTERS, totals), (_LEVELS, levels)):
            if name in families:
                labels = dict(_LABEL.findall(text))
                key = labels.get("model", ""), labels.get("version", "")
                field, scale = families[name]
                try:
                    value = float(number) * scale
                except ValueError:
                    continue
                # Failures come by reason.
                fields = found.setdefault(key, {})
                fields[field] = fields.get(field, 0.0) + value
    now = time.time_ns()
    for kind, found in ((Kind.TOTAL, totals), (Kind.LEVEL, levels)):
        for (model, version), fields in found.items():
            yield Reading(TRITON, {"triton": address, "model": model, "version": version}, fields, now, kind)
