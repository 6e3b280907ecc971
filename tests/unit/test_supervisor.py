"""In which order the parts of a suite end."""

from __future__ import annotations

from deploy.local.part import Part
from deploy.local.supervisor import waves


async def ready() -> bool:
    return True


def part(name: str, *needs: str, asks: str = "") -> Part:
    return Part(name, (), ready, needs=needs, asks=(asks,))


def test_who_is_needed_outlives_who_needs_it_and_equals_end_together() -> None:
    parts = [
        part("etcd"),
        part("triton"),
        part("triton-2"),
        part("registry", "etcd"),
        part("metrics", asks="registry"),
        part("gateway", "registry", asks="metrics"),
        part("inference", "registry", "triton", asks="metrics"),
        part("inference-2", "registry", "triton-2", asks="metrics"),
        part("envoy", "gateway"),
    ]
    assert [[part.name for part in wave] for wave in waves(parts)] == [
        ["envoy"],
        ["gateway", "inference", "inference-2"],
        ["metrics"],
        ["registry"],
        ["etcd", "triton", "triton-2"],
    ]
    assert waves([]) == []


def test_whom_a_part_asks_may_be_missing() -> None:
    parts = [part("registry"), part("gateway", "registry", asks="metrics")]
    assert [[part.name for part in wave] for wave in waves(parts)] == [["gateway"], ["registry"]]
