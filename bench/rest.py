"""What the gateway costs OpenAI's REST API: a server that computes nothing, reached directly, through Envoy
with all of our policies, and through LiteLLM's proxy where `litellm` is on PATH."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from bench import contestants, gateway
from bench.mock import CHUNKS
from bench.report import Target, ratio, row
from bench.suite import Suite
from tests.statics import static

PASSES = 3
PORT = 8940
PATH = "/v1/chat/completions"
MODEL = "mock"
START_S = 90.0
SEQUENTIAL = 200
# A server that does some 100 requests a second is not asked for 20,000.
REQUESTS, SLOW_REQUESTS = 10_000, 300
LITELLM_KEY = "sk-bench"


async def measure(suite: Suite) -> list[Target]:
    if shutil.which("h2load") is None:
        print("\nREST: skipped, h2load is not installed (Debian: apt-get install nghttp2-client)")
        return []
    return await asyncio.to_thread(_measure, suite)


def _measure(suite: Suite) -> list[Target]:
    mock, ours, theirs = (f"127.0.0.1:{PORT + suite.layout.offset + n}" for n in range(3))
    config = static(gateway.policies(suite, rest=mock))
    keys = {mock: "", ours: suite.key, theirs: LITELLM_KEY}
    with ExitStack() as stack:
        stack.enter_context(_answering([sys.executable, "-m", "bench.mock", mock], mock, keys[mock]))
        stack.enter_context(contestants.envoy_with(config, ours))
        addresses = {"the server itself": mock, "all policies": ours}
        if litellm := shutil.which("litellm"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "config.yaml").write_text(_litellm(mock))
            argv = [litellm, "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port"]
            stack.enter_context(_answering([*argv, theirs.rpartition(":")[2]], theirs, LITELLM_KEY))
            addresses["LiteLLM"] = theirs
        rates, streams, delays = _passes(
            addresses, keys, Path(stack.enter_context(tempfile.TemporaryDirectory()))
        )
    return _report(rates, streams, delays)


def _passes(
    addresses: Mapping[str, str], keys: Mapping[str, str], folder: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    whole, streamed = folder / "whole.json", folder / "streamed.json"
    whole.write_text(_body())
    streamed.write_text(_body(stream=True))
    found: list[dict[str, list[float]]] = [{name: [] for name in addresses} for _ in range(3)]
    for _ in range(PASSES):
        for name, address in addresses.items():
            count = SLOW_REQUESTS if name == "LiteLLM" else REQUESTS
            found[0][name].append(_load(address, keys[address], whole, count))
            found[1][name].append(_load(address, keys[address], streamed, count // 3))
            found[2][name].append(_sequential(address, keys[address]))
    return found[0], found[1], found[2]


def _report(
    rates: Mapping[str, list[float]], streams: Mapping[str, list[float]], delays: Mapping[str, list[float]]
) -> list[Target]:
    print(print(f"\nREST, 16 connections; a stream is {CHUNKS} chunks"))
    for name in rates:
        print(row(f"{name}, throughput", rates[name], "req/s"))
        print(row(f"{name}, streams", streams[name], "1/s"))
        print(row(f"{name}, latency p50", delays[name], "ms"))
    if "LiteLLM" not in rates:
        print("  LiteLLM: not on PATH")
        return []
    return [
        Target("all policies ÷ LiteLLM, req/s", ratio(rates["all policies"], rates["LiteLLM"]), 10),
        Target("all policies ÷ LiteLLM, streams/s", ratio(streams["all policies"], streams["LiteLLM"]), 10),
    ]


def _body(*, stream: bool = False) -> str:
    messages = [{"role": "user", "content": "What joins two rivers?"}]
    return json.dumps({"model": MODEL, "messages": messages, "stream": stream})


def _litellm(mock: str) -> str:
    parameters = {"model": f"openai/{MODEL}", "api_base": f"http://{mock}/v1", "api_key": "none"}
    models = [{"model_name": MODEL, "litellm_params": parameters}]
    return json.dumps({"model_list": models, "general_settings": {"master_key": LITELLM_KEY}})  # JSON is YAML


@contextmanager
def _answering(argv: list[str], address: str, key: str) -> Iterator[psutil.Process]:
    """A child that answers requests at `address`."""
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + START_S
        while True:
            try:
                _ask(http.client.HTTPConnection(address, timeout=10), key)
                break
            except (OSError, http.client.HTTPException) as err:
                if child.poll() is not None or time.monotonic() > ends:
                    raise ChildProcessError(f"{argv[0]} does not answer at {address}: {err}") from err
                time.sleep(0.2)
        yield psutil.Process(child.pid)
    finally:
        for process in psutil.Process(child.pid).children(recursive=True):
            process.terminate()
        child.terminate()
        child.wait()


def _ask(connection: http.client.HTTPConnection, key: str) -> None:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    connection.request("POST", PATH, _body(), headers)
    answer = connection.getresponse()
    said = answer.read()
    if answer.status != 200:
        raise http.client.HTTPException(f"{answer.status}: {said[:200]!r}")


def _sequential(address: str, key: str) -> float:
    """Median latency of one call at a time, ms."""
    connection = http.client.HTTPConnection(address, timeout=30)
    times = []
    for _ in range(SEQUENTIAL):
        begun = time.perf_counter()
        _ask(connection, key)
        times.append(time.perf_counter() - begun)
    connection.close()
    return statistics.median(times) * 1000


def _load(address: str, key: str, body: Path, requests: int) -> float:
    """Requests per second."""
    done = subprocess.run(
        [
            "h2load", "--h1", "-c", "16", "-n", str(requests), "-d", str(body),
            "-H", "content-type: application/json", "-H", f"authorization: Bearer {key}",
            f"http://{address}{PATH}",
        ],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert f"{requests} succeeded" in done.stdout, done.stdout
    found = re.search(r"([\d.]+) req/s", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])
