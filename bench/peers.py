"""Text generation of other servers on the same machine, by the same client: `vllm` (its CPU build) and
llama.cpp's `llama-server`, where they are on PATH. They run in turn; peers are stopped (SIGSTOP) while
others are measured. The suite goes on idling: a stopped one would lose its leases.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from bench.peer import Peer
from bench.report import Target, ratio, row
from bench.suite import Suite
from bench.text import TOKENS, Pass, prompts
from pipeline.bundled import TEXT_MODEL, shipped_gguf
from pipeline.decoder import package_gguf

PASSES = 3
STREAMS = (1, 8, 32)
START_S = 300.0
INT4 = "smollm2-int4"


class Server:
    """Somebody who answers OpenAI's completions. `process`, if any, is stopped while others are measured."""

    def __init__(
        self, name: str, address: str, model: str, key: str, process: psutil.Process | None = None
    ) -> None:
        self.name = name
        self.target = {"protocol": "sse", "address": address, "key": key, "model": model}
        self._process = process

    def signal(self, number: int) -> None:
        if self._process is None:
            return
        with suppress(psutil.NoSuchProcess):
            for process in [*self._process.children(recursive=True), self._process]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


async def measure(suite: Suite) -> list[Target]:
    if not any(map(shutil.which, ("vllm", "llama-server"))):
        print("\npeers: neither vllm nor llama-server is on PATH")
        return []
    with tempfile.TemporaryDirectory(prefix="lingqu-peers-") as folder:
        async with AsyncExitStack() as stack:
            int4 = await asyncio.to_thread(package_gguf, shipped_gguf(), Path(folder), precision="int4")
            await suite.publish(INT4, int4.folder)
            servers = [
                Server("Lingqu", suite.public, TEXT_MODEL, suite.key),
                Server("Lingqu, INT4", suite.public, INT4, suite.key),
            ]
            for name, argv, model in _commands(Path(folder)):
                try:
                    servers.append(await stack.enter_async_context(_Started(name, argv, model)))
                except ChildProcessError as err:
                    print(f"\npeers: {err}")
                else:
                    servers[-1].signal(signal.SIGSTOP)
            client = Peer("bench.stream_client")
            stack.callback(client.close)
            return _report(await _measured(servers, client))


async def _measured(servers: Sequence[Server], client: Peer) -> dict[tuple[str, int], list[Pass]]:
    found: dict[tuple[str, int], list[Pass]] = {}
    for number in range(PASSES + 1):
        for streams in STREAMS:
            texts = prompts(500 + number * 10 + streams, streams)
            for server in servers:
                for other in servers:
                    other.signal(signal.SIGSTOP)
                server.signal(signal.SIGCONT)
                await asyncio.sleep(0.5)
                told = await client.measure({**server.target, "prompts": texts, "max_tokens": TOKENS})
                if number:  # the first pass warms up
                    found.setdefault((server.name, streams), []).append(Pass.of(told))
    for server in servers:
        server.signal(signal.SIGCONT)
    return found


def _report(found: dict[tuple[str, int], list[Pass]]) -> list[Target]:
    print(f"\npeers: {TOKENS} tokens a stream, greedy, OpenAI's completions as server-sent events")
    targets = []
    for (name, streams), passes in sorted(found.items(), key=lambda item: item[0][1]):
        print(row(f"{name}, {streams} streams", [p.rate for p in passes], "tok/s"))
        print(row(f"{name}, {streams} streams, first token", [p.first for p in passes], "ms"))
        if name.startswith("Lingqu"):
            continue
        for who in ("Lingqu", "Lingqu, INT4"):
            ours = found[who, streams]
            what = f"{who.replace(',', '')} ÷ {name}, {streams} streams"
            if streams > 1 or "INT4" in who:  # FP16 is not what one stream alone would be served with
                rate = ratio([p.rate for p in ours], [p.rate for p in passes])
                targets.append(Target(f"{what}, tok/s", rate, 1.0))
            if streams > 1:
                first = ratio([p.first for p in ours], [p.first for p in passes])
                targets.append(Target(f"{what}, first token", first, 1.0, at_least=False))
    return targets


def _commands(folder: Path) -> list[tuple[str, list[str], str]]:
    """What is on PATH, with models made from the bundled one: llama.cpp's best quantisation, vLLM's BF16."""
    found = []
    if shutil.which("llama-server"):
        gguf = folder / "q4_0.gguf"
        if quantize := shutil.which("llama-quantize"):
            argv = [quantize, "--allow-requantize", str(shipped_gguf()), str(gguf), "q4_0"]
            subprocess.run(argv, check=True, capture_output=True)
        else:
            gguf = shipped_gguf()
        argv = ["llama-server", "-m", str(gguf), "-np", "32", "-c", "16384", "--host", "127.0.0.1", "--port"]
        found.append(("llama.cpp, " + ("Q4_0" if quantize else "Q4_1"), argv, "model"))
    if shutil.which("vllm"):
        checkpoint = folder / "checkpoint"
        _checkpoint(checkpoint)
        argv = ["vllm", "serve", str(checkpoint), "--served-model-name", "model", "--dtype", "bfloat16"]
        argv += ["--max-model-len", "2048", "--host", "127.0.0.1", "--port"]
        found.append(("vLLM, BF16", argv, "model"))
    return found


def _checkpoint(folder: Path) -> None:
    """The bundled model as transformers writes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    source = {"gguf_file": shipped_gguf().name, "local_files_only": True}
    quantised = AutoModelForCausalLM.from_pretrained(shipped_gguf().parent, **source)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**_plain(quantised.config.to_dict())))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(shipped_gguf().parent, **source).save_pretrained(folder)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """transformers does not write what it has read from a GGUF file while this says where it came from."""
    return {name: value for name, value in config.items() if name != "quantization_config"}


class _Started:
    """A peer's process until the end of the block."""

    def __init__(self, name: str, argv: list[str], model: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._name, self._argv, self._model = name, [*argv, str(self._port)], model

    async def __aenter__(self) -> Server:
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        env["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(os.cpu_count() or 1) - 1}"  # all cores, as the others have
        self._log = tempfile.NamedTemporaryFile(suffix=".log", delete=False)  # noqa: SIM115 - closed below
        self._process = await asyncio.create_subprocess_exec(
            *self._argv, stdout=self._log, stderr=self._log, start_new_session=True, env=env
        )
        deadline = time.monotonic() + START_S
        while not await asyncio.to_thread(self._ready):
            if self._process.returncode is not None or time.monotonic() > deadline:
                await self.__aexit__()
                raise ChildProcessError(f"{self._name} did not start; its log: {self._log.name}")
            await asyncio.sleep(1)
        address = f"127.0.0.1:{self._port}"
        return Server(self._name, address, self._model, "none", psutil.Process(self._process.pid))

    async def __aexit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._log.close()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
