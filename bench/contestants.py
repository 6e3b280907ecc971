"""Proxies before one Triton, for the table of `bench.gateway`: Envoy with none, some or all of our filters,
nginx, and a `grpc.aio` proxy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil

from deploy.local.layout import Layout
from deploy.local.parts import envoy
from services.gateway.snapshot import Snapshot
from tests.statics import static

START_TIMEOUT_S = 20.0
ROUTER = "envoy.filters.http.router"
_SCHEDULED = 2  # Linux's CPUCLOCK_SCHED
Config = dict[str, Any]


@contextmanager
def process(argv: list[str], address: str) -> Iterator[psutil.Process]:
    """A child that answers gRPC at `address`, ended with the block."""
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(START_TIMEOUT_S)
        yield psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait()


@contextmanager
def envoy_with(config: Config, address: str) -> Iterator[psutil.Process]:
    """One worker, as `lingqu up` gives it on two cores, with `config` and nothing else, listening at
    `address`."""
    host, _, port = address.rpartition(":")
    listen = {"socket_address": {"address": host, "port_value": int(port)}}
    config["static_resources"]["listeners"][0]["address"] = listen
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "envoy.json"
        file.write_text(json.dumps(config))
        binary = envoy(Layout(Path(folder))).argv[0]
        flags = ["--disable-hot-restart", "--concurrency", "1", "--log-level", "off"]
        with process([binary, "-c", str(file), *flags], address) as running:
            yield running


def pass_through(made: Snapshot, cluster: str) -> Config:
    """Envoy with the clusters of the snapshot and no policy: one route, no filter but the router."""
    config = static(made)
    manager = _manager(config)
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}]
    bare = {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]}
    for name in ("local_reply_config", "early_header_mutation_extensions"):
        manager.pop(name, None)
    manager["route_config"] = bare
    manager["http_filters"] = [f for f in manager["http_filters"] if f["name"] == ROUTER]
    return config


def with_filters(made: Snapshot, cluster: str, wanted: Callable[[str], bool]) -> Config:
    """`pass_through` with those of our filters whose name is wanted."""
    config = pass_through(made, cluster)
    full = _manager(static(made))["http_filters"]
    _manager(config)["http_filters"] = [f for f in full if f["name"] == ROUTER or wanted(f["name"])]
    return config


def _manager(config: Config) -> Any:
    return config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]


NGINX = """
worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000; http2_max_requests 100000000;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream triton {{ server {target}; keepalive 64; keepalive_requests 100000000; }}
  server {{ listen {listen} http2; location / {{ grpc_pass grpc://triton; }} }}
}}
"""


@contextmanager
def nginx(listen: str, target: str) -> Iterator[psutil.Process | None]:
    """nginx's grpc_pass, checking nothing; None if it is not installed."""
    binary = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if binary is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nginx.conf"
        file.write_text(NGINX.format(folder=folder, listen=listen, target=target))
        with process([binary, "-c", str(file), "-p", folder], listen) as master:
            yield master.children()[0]


@contextmanager
def grpc_aio(listen: str, target: str) -> Iterator[psutil.Process]:
    with process([sys.executable, "-m", "bench.proxy", listen, target], listen) as running:
        yield running


def cpu_s(running: psutil.Process) -> float:
    """Processor time that the process has used, s, by its clock (clock_getcpuclockid(3)), which counts
    nanoseconds: a tick of /proc's is as much as some hundred requests take. Raises OSError."""
    return time.clock_gettime(~running.pid << 3 | _SCHEDULED)
