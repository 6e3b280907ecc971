"""Builds the gRPC stubs from `protos/` into the `lingqu` package; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def generate_stubs() -> None:
    """Write `_pb2.py`, `_pb2_grpc.py` and their types beside each other; idempotent."""
    import google.api
    import grpc_tools
    from grpc_tools import protoc

    # The protoc plug-ins are console scripts of the environment that builds.
    plugins = [
        f"--plugin=protoc-gen-{name}={_script(f'protoc-gen-{name}')}" for name in ("mypy", "mypy_grpc")
    ]
    sources = sorted(str(p.relative_to(ROOT / "protos")) for p in (ROOT / "protos").rglob("*.proto"))
    # google/protobuf is with the compiler, google/api with googleapis-common-protos.
    folders = [
        ROOT / "protos",
        Path(grpc_tools.__file__).parent / "_proto",
        Path(google.api.__path__[0]).parents[1],
    ]
    args = ["protoc", *(f"-I{folder}" for folder in folders), *plugins]
    args += [f"--{kind}_out={ROOT}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main([*args, *sources]) != 0:
        raise SystemExit("setup.py: protoc failed; its message is above")
    for source in sources:
        for folder in list((ROOT / source).parents)[:2]:  # lingqu/<service>/v1 and lingqu/<service>
            (folder / "__init__.py").touch()


def _script(name: str) -> str:
    import shutil

    found = shutil.which(name, path=f"{Path(sys.executable).parent}") or shutil.which(name)
    if found is None:
        raise SystemExit(f"setup.py: {name} not found; install mypy-protobuf")
    return found


class BuildWithStubs(build_py):
    def run(self) -> None:
        generate_stubs()
        super().run()


if __name__ == "__main__":
    if sys.argv[-1] == "stubs":
        generate_stubs()
    else:
        setup(cmdclass={"build_py": BuildWithStubs})
