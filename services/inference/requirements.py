"""What a version asks of the machine that loads it, and what this machine is."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from services.inference.gpu import Gpu, gpus

# Runtimes that are distributions; "python" is the interpreter.
ENGINES = ("openvino-genai", "onnxruntime", "openvino", "tensorrt", "tensorrt-llm")
ON_GPU = ("tensorrt", "tensorrt-llm")

# What the engines choose their kernels by, and with them the last bits of what they compute; in this order.
_FEATURES = (
    *("sse4_2", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)


class Needs(Protocol):
    """Requirements, as a version's record and its manifest have them; empty means any."""

    @property
    def engine(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that runs models: versions of its engines by runtime, the kind of its processor, its GPUs."""

    engines: Mapping[str, str]
    fingerprint: str
    gpus: tuple[Gpu, ...] = ()

    @property
    def labels(self) -> dict[str, str]:
        """What placements may choose by."""
        gpu = {"gpu": self.gpus[0].fingerprint} if self.gpus else {}
        return {"fingerprint": self.fingerprint, **gpu}

    @classmethod
    def here(cls) -> Machine:
        engines = {"python": platform.python_version()}
        for name in ENGINES:
            try:
                engines[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return cls(engines, fingerprint(), gpus())


def unmet(needs: Needs, runtime: str, machine: Machine) -> str | None:
    """Why `machine` must not load what has these needs; None if it may."""
    if runtime in ON_GPU and not machine.gpus:
        return f'its runtime is {runtime}, which needs an NVIDIA GPU; this replica is "{machine.fingerprint}"'
    if runtime in ON_GPU and not machine.engines.get(runtime):
        return f"its runtime is {runtime}, and this replica has none installed"
    if needs.engine:
        installed = machine.engines.get(runtime, "")
        try:
            specifier = SpecifierSet(needs.engine)
        except InvalidSpecifier:
            return f'its engine requirement "{needs.engine}" is no version specifier (PEP 440)'
        if not installed:
            return f"it needs {runtime} {needs.engine}, and this replica has none"
        if not specifier.contains(installed, prereleases=True):
            return f"it needs {runtime} {needs.engine}, and this replica has {installed}"
    kinds = [machine.fingerprint, *(gpu.fingerprint for gpu in machine.gpus)]
    if needs.fingerprint and needs.fingerprint not in kinds:
        return f'it was built for "{needs.fingerprint}", and this replica is "{" and ".join(kinds)}"'
    return None


def fingerprint(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """This kind of machine, for example "cpu-x86_64-sse4_2-avx2-fma-f16c": its architecture and the
    instructions that matter to the engines. At most 200 characters; the same on every machine of a kind."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        text = ""  # no Linux: the architecture has to do
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    features = set(line[1].split()) if line else set()
    return "-".join(["cpu", platform.machine() or "unknown", *(f for f in _FEATURES if f in features)])


def same_minor(runtime: str) -> str:
    """The specifier that admits the installed engine's minor version, which is what an artifact has been made
    and compared with: "2026.4.1.0" gives ">=2026.4,<2026.5". Empty if it is not installed."""
    installed = Machine.here().engines.get(runtime, "")
    release = [int(part) for part in re.findall(r"\d+", installed)[:2]]
    if len(release) < 2:
        return ""
    major, minor = release
    return f">={major}.{minor},<{major}.{minor + 1}"
