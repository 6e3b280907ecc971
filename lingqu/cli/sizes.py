"""`lingqu models size`: what a model takes, and how much fits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from lingqu.cli.connection import Suite, fail, out
from lingqu.cli.models import read_model
from lingqu.cli.output import Format, Output
from lingqu.cli.output import table as show_table

if TYPE_CHECKING:
    from services.inference.estimate import Estimate

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
LENGTHS = (512, 2048, 8192, 32768, 131072)


def size(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of a model, or the folder of an artifact.")],
    version: Annotated[
        int, typer.Option(help="Of the model; default: the one with the traffic, or the newest.", min=0)
    ] = 0,
    memory: Annotated[
        str, typer.Option(help="What there is for the whole engine, like 24GiB; the cache gets what is left.")
    ] = "",
    cache: Annotated[str, typer.Option(help="KV cache, like 4GiB, if no --memory is given.")] = "1GiB",
    sequence: Annotated[
        int, typer.Option(help="Tokens of a sequence, prompt and answer together; 0: several lengths.", min=0)
    ] = 0,
    output: Output = Format.table,
) -> None:
    """Memory for weights and for each token in the KV cache, and how many sequences of which length fit."""
    try:
        from services.inference import estimate, sizing
        from services.inference.artifact import InvalidManifest, Manifest
        from services.inference.weights import UnreadableWeights
    except ImportError as error:
        fail(f"{error.name} is not installed; `models size` needs: pip install 'lingqu[serve]'")
    given, cache_bytes = _bytes("--memory", memory), _bytes("--cache", cache)
    folder = _folder(context.obj, model, version)
    try:
        manifest = Manifest.read(folder)
        found = estimate.of(folder, manifest, 0)
    except (OSError, InvalidManifest, UnreadableWeights) as error:
        fail(f"{folder}: {error}")
    if manifest.text is None:
        cache_bytes = 0
    elif given:
        cache_bytes = max(0, given - found.footprint.total)
    body = _body(found, cache_bytes, given)
    if manifest.text is not None:
        body["context_tokens"] = manifest.text.context_tokens
        lengths = [sequence] if sequence else _lengths(manifest.text.context_tokens)
        if found.kv is not None:
            body["sequences"] = {str(n): found.kv.sequences(cache_bytes, n) for n in lengths}
            body["longest_sequence"] = min(found.kv.longest(cache_bytes), manifest.text.context_tokens)
        else:
            body["missing"] = "the artifact does not tell its layers, heads and head size"
    if output == Format.json:
        typer.echo(json.dumps(body, indent=2))
        return
    _show(body, sizing.mib)


def _body(found: Estimate, cache_bytes: int, given: int) -> dict[str, Any]:
    """What is told of any model; bytes."""
    needed = found.footprint
    total = needed.total + cache_bytes
    body: dict[str, Any] = {
        "weights": dict(needed.weights),
        "weights_in_engine": needed.resident,
        "engine": needed.fixed,
        "activations": needed.activations,
        "kv_cache": cache_bytes,
        "total": total,
    }
    if given:
        body["memory"] = given
        body["fits"] = total <= given
    if found.kv is not None:
        body["kv_precision"] = found.kv.precision
        body["kv_bytes_per_token"] = found.kv.bytes_per_token
        body["kv_block_tokens"] = found.kv.block_tokens
    if found.architecture is not None:
        body["architecture"] = found.architecture.model_dump()
    return body


def _show(body: dict[str, Any], mib: Any) -> None:
    weights = ", ".join(f"{kind} {mib(size)}" for kind, size in body["weights"].items() if size >= 1 << 20)
    rows = [
        ("weights in the artifact", weights or mib(sum(body["weights"].values()))),
        ("weights in the engine", f"{mib(body['weights_in_engine'])} (estimated)"),
        ("engine and process", f"{mib(body['engine'])} (estimated)"),
    ]
    if body["activations"]:
        rows.append(("activations", f"{mib(body['activations'])} (estimated)"))
    if "kv_bytes_per_token" in body:
        per = f"{body['kv_bytes_per_token']} bytes a token ({body['kv_precision']})"
        rows.append(
            ("KV cache", f"{mib(body['kv_cache'])}: {per}, blocks of {body['kv_block_tokens']} tokens")
        )
    rows.append(("together", mib(body["total"])))
    if "memory" in body:
        rows.append(("given", mib(body["memory"]) + ("" if body["fits"] else ": too little")))
    for length, count in body.get("sequences", {}).items():
        rows.append((f"of {length} tokens", f"{count} sequences at once"))
    if "missing" in body:
        rows.append(("KV cache", body["missing"]))
    show_table(("WHAT", "SIZE"), rows, "")
    if "longest_sequence" in body:
        out.print(
            escape(
                f"the longest: {body['longest_sequence']} tokens (the context is {body['context_tokens']})"
            )
        )


def footprint(suite: Suite, name: str, version: int) -> tuple[int, int] | None:
    """Bytes of a replica with a KV cache of the default size, and of a token in it (0 if it has none); None
    if this machine has neither the artifact nor what reads it."""
    try:
        from services.inference import estimate
        from services.inference.artifact import InvalidManifest, Manifest
        from services.inference.weights import UnreadableWeights
    except ImportError:
        return None
    folder = _place(suite, name, version)
    if folder is None:
        return None
    try:
        manifest = Manifest.read(folder)
        found = estimate.of(folder, manifest, 0)
    except (OSError, InvalidManifest, UnreadableWeights):
        return None
    cache = UNITS["GiB"] if manifest.text is not None else 0
    return found.footprint.total + cache, found.kv.bytes_per_token if found.kv is not None else 0


def _folder(suite: Suite, name: str, version: int) -> Path:
    """Of an artifact on this machine. Ends the command if there is none."""
    if (Path(name) / "manifest.json").is_file():
        return Path(name)
    model = read_model(suite, name)
    wanted = version or model.traffic_version or max((v.version for v in model.versions), default=0)
    record = next((v for v in model.versions if v.version == wanted), None)
    if record is None:
        fail(f'"{name}" has no version {wanted}')
    place = _at(suite, record)
    if place is None:
        fail(f"{name} v{wanted} is at {record.artifact.uri}, not on this machine: name the folder of a copy")
    return place


def _place(suite: Suite, name: str, version: int) -> Path | None:
    model = read_model(suite, name)
    record = next((v for v in model.versions if v.version == version), None)
    return None if record is None else _at(suite, record)


def _at(suite: Suite, record: Any) -> Path | None:
    """Where this machine has the artifact of a version."""
    places = [suite.state / "artifacts" / record.artifact.sha256]
    if record.artifact.uri.startswith("file://"):
        places.append(Path(record.artifact.uri.removeprefix("file://")))
    return next((p for p in places if (p / "manifest.json").is_file()), None)


def _lengths(context: int) -> list[int]:
    return [*(length for length in LENGTHS if length < context), context]


def _bytes(option: str, text: str) -> int:
    """ "24GiB", "512MiB"; 0 for nothing. Ends the command if it is not like that."""
    if not text:
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB|)", text)
    if found is None:
        fail(f'{option}: "{text}" is not like 24GiB')
    return int(float(found[1]) * UNITS[found[2]])
