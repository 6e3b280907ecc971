"""The tensor path: an echo model through the public port, Triton directly, and a plain `grpc.aio` proxy."""

from __future__ import annotations

import asyncio
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from bench.report import Target, ratio, row
from bench.suite import Suite

PASSES = 7
REQUESTS = 20_000
SEQUENTIAL = 1_000
METHOD = "/inference.GRPCInferenceService/ModelInfer"
PROXY_PORT = 8990


async def measure(suite: Suite) -> list[Target]:
    """Prints what was measured and returns what had to be reached."""
    if shutil.which("h2load") is None:
        print("tensor path: skipped, h2load is not installed (Debian: apt-get install nghttp2-client)")
        return []
    await suite.publish_echo()
    listen = f"127.0.0.1:{PROXY_PORT + suite.layout.offset}"
    proxy = subprocess.Popen([sys.executable, "-m", "bench.proxy", listen, suite.triton])
    try:
        addresses = {"Triton direct": suite.triton, "public port": suite.public, "grpc.aio proxy": listen}
        return await asyncio.to_thread(_measure, addresses, suite.key, suite.triton)
    finally:
        proxy.terminate()
        proxy.wait()


def _measure(addresses: dict[str, str], key: str, triton: str) -> list[Target]:
    with tempfile.NamedTemporaryFile(suffix=".grpc") as file:
        file.write(frame())
        file.flush()
        for address in addresses.values():
            once(address, key)
            load(address, key, file.name, REQUESTS // 4)
        before = executed(triton)
        rates: dict[str, list[float]] = {name: [] for name in addresses}
        delays: dict[str, list[float]] = {name: [] for name in addresses}
        for number in range(PASSES):
            names = list(addresses)
            for name in names[number % 3 :] + names[: number % 3]:
                rates[name].append(load(addresses[name], key, file.name, REQUESTS))
        sent = PASSES * REQUESTS * len(addresses)
        # h2load sees HTTP 200 and no gRPC status: what Triton computed is the proof.
        done = executed(triton) - before
        assert done == sent, f"Triton computed {done} of {sent} requests"
        for _ in range(PASSES):
            for name, address in addresses.items():
                delays[name].append(sequential(address, key))
    print(f"\ntensor path: ModelInfer of an echo model, h2load -c 4 -m 16 -n {REQUESTS}, then one at a time")
    for name in addresses:
        print(row(f"{name}, throughput", rates[name], "req/s"))
    for name in addresses:
        print(row(f"{name}, latency p50", delays[name], "ms"))
    added = statistics.median(
        a - b for a, b in zip(delays["public port"], delays["Triton direct"], strict=True)
    )
    return [
        Target(
            "public port ÷ grpc.aio proxy, req/s", ratio(rates["public port"], rates["grpc.aio proxy"]), 3.5
        ),
        Target(
            "public port ÷ Triton direct, req/s", ratio(rates["public port"], rates["Triton direct"]), 0.65
        ),
        Target("public port − Triton direct, latency p50", added, 0.45, at_least=False, unit="ms"),
    ]


def frame() -> bytes:
    """One request as gRPC sends it."""
    raw: bytes = _request().SerializeToString()
    return b"\0" + len(raw).to_bytes(4, "big") + raw


def _request() -> Any:
    values = np.arange(16, dtype=np.int32)
    request = pb.ModelInferRequest(model_name="echo")
    request.inputs.add(name="INPUT", datatype="INT32", shape=[1, 16])
    request.raw_input_contents.append(values.tobytes())
    return request


def once(address: str, key: str) -> None:
    """One call with its answer checked, retried while the server at `address` starts."""
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        metadata = (("authorization", f"Bearer {key}"),)
        answer = stub.ModelInfer(_request(), metadata=metadata, timeout=10, wait_for_ready=True)
        assert answer.raw_output_contents[0] == _request().raw_input_contents[0]


def load(address: str, key: str, frame: str, requests: int) -> float:
    """Requests per second."""
    done = subprocess.run(
        [
            "h2load", "-c", "4", "-m", "16", "-n", str(requests), "-d", frame,
            "-H", "content-type: application/grpc", "-H", "te: trailers",
            "-H", f"authorization: Bearer {key}",
            f"http://{address}{METHOD}",
        ],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert f"{requests} succeeded" in done.stdout, done.stdout
    found = re.search(r"([\d.]+) req/s", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


def sequential(address: str, key: str) -> float:
    """Median latency of one call at a time, ms."""
    request, metadata = _request(), (("authorization", f"Bearer {key}"),)
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        times = []
        for _ in range(SEQUENTIAL):
            begun = time.perf_counter()
            stub.ModelInfer(request, metadata=metadata)
            times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1000


def executed(triton: str) -> int:
    with grpc.insecure_channel(triton) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.ModelStatistics(pb.ModelStatisticsRequest(name="echo"))
        return int(answer.model_stats[0].inference_stats.success.count)
