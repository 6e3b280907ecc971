"""The gateway's price: an echo model in Triton reached directly, through Envoy with none and with all of our
policies, through nginx, and through a `grpc.aio` proxy; and what each filter costs.

Throughput is h2load's, in many short slices by turns: what a machine does within minutes weighs on all alike,
and ratios are of slices of the same round. Processor time of each proxy is counted, too: it drifts less."""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import psutil

from bench import contestants, tensor
from bench.report import Target, ratio, ratios, row
from bench.suite import Suite
from deploy.local import layout as at
from lingqu.registry.v1 import access_pb2, access_pb2_grpc
from services.core import tls
from services.core.access import RATES, Access, Client, Limits
from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.core.lifecycle import CHANNEL_OPTIONS
from services.gateway.listener import TOLD_PERCENT, Entry
from services.gateway.snapshot import Snapshot, snapshot
from services.gateway.view import view
from tests.statics import static

ROUNDS = 24
# More of them for the two that are compared to a few hundredths: slices of a round differ by a tenth.
PAIR_ROUNDS = 48
REQUESTS = 5_000  # of a slice: a third of a second
SEQUENTIAL_PASSES = 9
PROFILE_ROUNDS = 12
PLAIN, OURS = "Envoy, no policy", "public port"
SLOW_PROXY, SLOWER = "grpc.aio proxy", 5  # a slice of it has so many times fewer
PORT = 8960
CLIENTS = 100
MANY = 1_000_000  # requests a second that a client may make
CLUSTER = "tensor/echo/1"
# Names of filters, in their order, behind which the profile looks.
STEPS = (
    ("authentication", "key"),
    ("grpc_field_extraction", "model's name"),
    ("set_filter_state", "route by it"),
    ("lua", "scripts, idle"),
    ("access", "allow-list"),
    ("limits", "limits"),
)


async def measure(suite: Suite) -> list[Target]:
    """Prints what was measured and returns what had to be reached."""
    await suite.publish_echo()
    await _admit(suite)
    return await asyncio.to_thread(_measure, suite)


async def _admit(suite: Suite) -> None:
    """The suite knows CLIENTS clients with allow-lists and limits, of which the caller is one."""
    async with tls.channel(
        suite.layout.address(at.REGISTRY), CHANNEL_OPTIONS, suite.layout.identity("cli")
    ) as channel:
        registry = access_pb2_grpc.AccessServiceStub(channel)
        for client in _clients():
            limits = access_pb2.Limits(
                requests_per_second=client.limits.requests_per_second,
                requests_per_minute=client.limits.requests_per_minute,
                concurrent_requests=client.limits.concurrent_requests,
                scope=access_pb2.Limits.SCOPE_LOCAL,
            )
            record = access_pb2.Client(name=client.name, models=client.models, limits=limits)
            request = access_pb2.SetClientRequest(client=record)
            await registry.SetClient(
                request, timeout=10, metadata=(("authorization", f"Bearer {suite.key}"),)
            )
    await asyncio.sleep(1)  # until Envoy has them


def _clients() -> tuple[Client, ...]:
    """Limits that are never reached."""
    limits = Limits(MANY, 60 * MANY, 1000, local=RATES)
    names = ("dev", *(f"c{n}" for n in range(CLIENTS - 1)))
    return tuple(Client(name, ("echo", "mock", "other-*"), limits) for name in names)


def _measure(suite: Suite) -> list[Target]:
    made = policies(suite)
    with ExitStack() as stack, tempfile.NamedTemporaryFile(suffix=".grpc") as file:
        file.write(tensor.frame())
        file.flush()
        addresses, running = {"Triton direct": suite.triton}, {}

        def enter(name: str, start: Callable[[str], Any]) -> None:
            address = f"127.0.0.1:{PORT + suite.layout.offset + len(addresses)}"
            if (found := stack.enter_context(start(address))) is not None:
                addresses[name], running[name] = address, found

        bare = contestants.pass_through(made, CLUSTER)
        enter(PLAIN, lambda at: contestants.envoy_with(bare, at))
        # Neighbours, since they are compared.
        addresses[OURS], running[OURS] = suite.public, suite.part("envoy -c")
        enter("nginx, no policy", lambda at: contestants.nginx(at, suite.triton))
        enter(SLOW_PROXY, lambda at: contestants.grpc_aio(at, suite.triton))
        load = Load(suite, file.name)
        rates, costs = load.interleaved(addresses, running, ROUNDS)
        two = {name: addresses[name] for name in (PLAIN, OURS)}
        more_rates, more_costs = load.interleaved(two, {name: running[name] for name in two}, PAIR_ROUNDS)
        delays = load.sequential(addresses, SEQUENTIAL_PASSES)
        _profile(suite, load, made)
    print(f"\ngateway: ModelInfer of an echo model, h2load -c 4 -m 16 -n {REQUESTS}, then one at a time")
    for name in addresses:
        print(row(f"{name}, throughput", rates[name], "req/s"))
    for name in running:
        print(row(f"{name}, processor time", costs[name], "µs"))
    for name in addresses:
        print(row(f"{name}, latency p50", delays[name], "ms"))
    ours = rates[OURS]
    compared = ratios(ours + more_rates[OURS], rates[PLAIN] + more_rates[PLAIN])
    used = zip(costs[OURS] + more_costs[OURS], costs[PLAIN] + more_costs[PLAIN], strict=True)
    print(row("of policies, processor time", [a - b for a, b in used], "µs"))
    print(row("public port ÷ Envoy, no policy, by rounds", compared, "×"))
    added = statistics.median(
        ours - theirs for ours, theirs in zip(delays[OURS], delays["Triton direct"], strict=True)
    )
    found = [
        Target("public port ÷ Envoy without policies, req/s", statistics.median(compared), 0.85),
        Target("public port ÷ grpc.aio proxy, req/s", ratio(ours, rates[SLOW_PROXY]), 4),
        Target("public port − Triton direct, latency p50", added, 0.35, at_least=False, unit="ms"),
    ]
    if "nginx, no policy" in rates:
        found.append(
            Target("public port ÷ nginx without policies, req/s", ratio(ours, rates["nginx, no policy"]), 1)
        )
    return found


def policies(suite: Suite, *, rest: str = "", metrics: str = "", percent: int = TOLD_PERCENT) -> Snapshot:
    """A suite with CLIENTS clients, whose one replica is the Triton of `suite` with a model "echo",
    or something at `rest` that answers OpenAI's API for a model "mock". `metrics`: who is told of
    so many percent of tensor requests."""
    name, task = ("mock", "generate") if rest else ("echo", "tensor")
    version = Version(VersionKey(name, 1), "file:///x", "0", task, "python")
    endpoints = {"http": rest} if rest else {"oip": suite.triton}
    replica = Replica("r", "inference", endpoints, (Hosted(version.key, READY),))
    models = [Model(name, (version,), ((1, 100),))]
    keys = json.loads(suite.layout.jwks.read_text())
    entry = Entry(suite.public, "127.0.0.1:1", keys, metrics=metrics, metrics_percent=percent)
    return snapshot(view([replica], models, Access(_clients())), entry)


class Load:
    """Load on one method with one message, from files and a key of the suite."""

    def __init__(self, suite: Suite, frame: str) -> None:
        self._key, self._frame, self._triton = suite.key, frame, suite.triton

    def interleaved(
        self, addresses: Mapping[str, str], running: Mapping[str, psutil.Process], rounds: int
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Requests a second, and µs of processor time a request, by name and round. Each second round runs
        backwards, so that of two neighbours neither is always the first."""
        for address in addresses.values():
            tensor.once(address, self._key)
            tensor.load(address, self._key, self._frame, REQUESTS)
        before, sent = tensor.executed(self._triton), 0
        rates: dict[str, list[float]] = {name: [] for name in addresses}
        costs: dict[str, list[float]] = {name: [] for name in running}
        for number in range(rounds):
            for name in reversed(list(addresses)) if number % 2 else addresses:
                count = REQUESTS // SLOWER if name == SLOW_PROXY else REQUESTS
                used = contestants.cpu_s(running[name]) if name in running else 0.0
                rates[name].append(tensor.load(addresses[name], self._key, self._frame, count))
                if name in running:
                    costs[name].append((contestants.cpu_s(running[name]) - used) / count * 1e6)
                sent += count
        # h2load sees HTTP 200 and no gRPC status: what Triton computed is the proof.
        done = tensor.executed(self._triton) - before
        assert done == sent, f"Triton computed {done} of {sent} requests"
        return rates, costs

    def sequential(self, addresses: Mapping[str, str], passes: int) -> dict[str, list[float]]:
        """Median latency of one call at a time, ms, by name and pass."""
        delays: dict[str, list[float]] = {name: [] for name in addresses}
        for _ in range(passes):
            for name, address in addresses.items():
                delays[name].append(tensor.sequential(address, self._key))
        return delays


def _named(parts: tuple[str, ...], name: str) -> bool:
    return any(part in name for part in parts)


def _profile(suite: Suite, load: Load, made: Snapshot) -> None:
    """What one Envoy takes for a request with more and more of our filters."""
    ladder = {"router alone": contestants.pass_through(made, CLUSTER)}
    wanted: list[str] = []
    for part, said in STEPS:
        wanted.append(part)
        some = tuple(wanted)
        ladder[f"+ {said}"] = contestants.with_filters(made, CLUSTER, partial(_named, some))
    ladder["+ routes, errors"] = static(made)
    with ExitStack() as stack:
        addresses, running = {}, {}
        for number, (name, config) in enumerate(ladder.items()):
            addresses[name] = f"127.0.0.1:{PORT + 10 + number + suite.layout.offset}"
            running[name] = stack.enter_context(contestants.envoy_with(config, addresses[name]))
        _, costs = load.interleaved(addresses, running, PROFILE_ROUNDS)
    print("\nprocessor time of one Envoy for a request, with more and more filters")
    for name, values in costs.items():
        print(row(name, values, "µs"))
