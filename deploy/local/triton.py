"""Triton from the nvidia-pytriton wheel: a private, runnable copy of its server and Python backend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from deploy.local.layout import HOST, TRITON_GRPC, TRITON_HTTP, TRITON_METRICS, Layout
from services.core.tls import Identity


class TritonUnusable(Exception):
    """Triton cannot run here; the text says what to install."""


@dataclass(frozen=True, slots=True)
class TritonFiles:
    """`home` holds bin/ and backends/ of the private copy."""

    home: Path
    libraries: str
    site_packages: Path

    @property
    def repository(self) -> Path:
        return self.home / "models"


def has_libpython() -> bool:
    """Whether the shared library that the stub needs is on this machine."""
    try:
        _libpython_folder(f"{sys.version_info.major}.{sys.version_info.minor}")
    except TritonUnusable:
        return False
    return True


def prepare(home: Path) -> TritonFiles:
    """Copy what must be executable or changed (85 MB, once). Raises TritonUnusable."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise TritonUnusable("the package nvidia-pytriton is not installed: pip install 'lingqu[serve]'")
    package = Path(spec.origin).parent
    site_packages = package.parent
    source = package / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = source / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        raise TritonUnusable(f"nvidia-pytriton has no Python {python} stub; use Python 3.11")
    binary = home / "bin" / "tritonserver"
    backend = home / "backends" / "python"
    version = importlib.metadata.version("nvidia-pytriton")
    stamp = home / "version"
    if not stamp.is_file() or stamp.read_text() != version:
        shutil.copytree(source / "backends" / "python", backend, dirs_exist_ok=True)
        shutil.copy(stub, backend / stub.name)
        (backend / stub.name).chmod(0o755)
        binary.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "bin" / "tritonserver", binary)
        binary.chmod(0o755)
        stamp.write_text(version)  # last: a copy that was interrupted is made again
    (home / "models").mkdir(parents=True, exist_ok=True)
    libraries = [str(site_packages / "nvidia_pytriton.libs"), str(_libpython_folder(python))]
    return TritonFiles(home, ":".join(libraries), site_packages)


def command(files: TritonFiles, layout: Layout, identity: Identity | None = None) -> tuple[str, ...]:
    """The whole command line; everything is bound to loopback. With an identity, gRPC answers only other
    parts; its HTTP has no TLS."""
    ports = {"http": TRITON_HTTP, "grpc": TRITON_GRPC, "metrics": TRITON_METRICS}
    flags = [
        f"--{name}-{what}"
        for name, base in ports.items()
        for what in (f"port={layout.port(base)}", f"address={HOST}")
    ]
    return (
        str(files.home / "bin" / "tritonserver"),
        f"--model-repository={files.repository}",
        f"--backend-directory={files.home / 'backends'}",
        f"--backend-config=python,shm-region-prefix-name={_shm_prefix(layout)}",
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",
        # Ready is who serves; a version that was refused or retired does not make all of it unready.
        "--strict-readiness=false",
        "--exit-timeout-secs=4",
        # The models get the caller's trace context as a request parameter.
        "--grpc-header-forward-pattern=(?i)traceparent",
        *flags,
        *(_tls(identity) if identity else ()),
    )


def _tls(identity: Identity) -> tuple[str, ...]:
    """Read once, at start."""
    return (
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={identity.certificate}",
        f"--grpc-server-key={identity.key}",
        f"--grpc-root-cert={identity.ca}",
    )


def environment(files: TritonFiles) -> dict[str, str]:
    """The stub embeds this Python: it needs our packages, our interpreter on PATH and Triton's libraries."""
    import os

    root = Path(__file__).resolve().parents[2]
    return {
        "LD_LIBRARY_PATH": files.libraries,
        "PYTHONPATH": f"{files.site_packages}:{root}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
    }


def shared_memory(layout: Layout) -> str:
    """Pattern of the regions that a killed Triton, or its model processes, leave in memory."""
    return f"/dev/shm/{_shm_prefix(layout)}*"  # noqa: S108 - where POSIX puts them


def _shm_prefix(layout: Layout) -> str:
    return f"lingqu{layout.port(TRITON_GRPC)}_"


def _libpython_folder(python: str) -> Path:
    """Where libpython is: the stub is linked against it, and not every Python comes with one."""
    name = f"libpython{python}.so.1.0"
    own = f"{sys.prefix}/share/lingqu/lib"  # where libpython.sh puts it
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", "/usr/lib/x86_64-linux-gnu", own]
    for folder in filter(None, folders):
        if (Path(folder) / name).exists():
            return Path(folder)
    raise TritonUnusable(
        f"{name} was not found, and Triton's Python backend needs it: install your system's shared Python "
        f"library (Debian: apt-get install libpython{python})"
    )
