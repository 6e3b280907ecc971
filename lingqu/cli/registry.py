"""`lingqu registry …`: its state as a file, and back."""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from rich.markup import escape

from lingqu.cli.connection import REGISTRY_PORT, Suite, err, fail, out, run
from lingqu.cli.output import Format, Output, as_json, when
from lingqu.registry.v1 import backups_pb2
from lingqu.registry.v1.backups_pb2_grpc import BackupServiceStub

app = typer.Typer(help="The registry's state: back it up, restore it.", no_args_is_help=True)
KIND = "lingqu-registry-backup"
RECORDS_A_MESSAGE = 100


@app.command()
def backup(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Where to write it; '-' for standard output.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    output: Output = Format.table,
) -> None:
    """Save models, versions, releases, policies, clients and revoked keys. Works while etcd is gone.

    With '-' nothing but the backup is printed."""
    to_stdout = str(file) == "-"
    if not to_stdout and file.exists() and not force:
        fail(f"{file} is there already; --force replaces it")

    async def work(suite: Suite) -> tuple[backups_pb2.BackupHeader, list[backups_pb2.BackupRecord]]:
        header, records = backups_pb2.BackupHeader(), []
        async with suite.channel(REGISTRY_PORT) as channel:
            stub: Any = BackupServiceStub(channel)
            request = backups_pb2.BackupRequest()
            async for part in stub.Backup(request, timeout=120, metadata=suite.metadata):
                if part.HasField("header"):
                    header = part.header
                records += part.records
        return header, records

    header, records = run(work(context.obj))
    if len(records) != header.records:
        fail(f"the registry sent {len(records)} of {header.records} records; try again")
    lines = [json.dumps({"kind": KIND, "header": MessageToDict(header, preserving_proto_field_name=True)})]
    lines += [json.dumps({"key": r.key, "value": b64encode(r.value).decode()}) for r in records]
    text = "\n".join(lines) + "\n"
    if to_stdout:
        typer.echo(text, nl=False)
        return
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(file)
    if header.stale:
        err.print("[yellow]etcd is out of reach: this is the last known state[/yellow]")
    if output == Format.json:
        as_json(header)
        return
    sha256 = f"{header.sha256[:16]}…"
    out.print(f"{escape(str(file))}: {header.records} records at revision {header.revision}, sha256 {sha256}")


@app.command()
def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="What `lingqu registry backup` wrote.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the state that the registry has.")
    ] = False,
    output: Output = Format.table,
) -> None:
    """Write a backup into the registry, checked first. What is there is replaced only when told."""
    header, records = _read(file)

    def messages() -> Iterator[backups_pb2.RestoreRequest]:
        yield backups_pb2.RestoreRequest(header=header, overwrite=overwrite)
        for start in range(0, len(records), RECORDS_A_MESSAGE):
            yield backups_pb2.RestoreRequest(records=records[start : start + RECORDS_A_MESSAGE])

    async def work(suite: Suite) -> Any:
        async with suite.channel(REGISTRY_PORT) as channel:
            stub: Any = BackupServiceStub(channel)
            return await stub.Restore(messages(), timeout=300, metadata=suite.metadata)

    answer = run(work(context.obj))
    if output == Format.json:
        as_json(answer)
        return
    removed = f", {answer.removed} others removed" if answer.removed else ""
    out.print(f"{answer.records} records of {when(header.create_time)} UTC restored{removed}")


def _read(file: Path) -> tuple[backups_pb2.BackupHeader, list[backups_pb2.BackupRecord]]:
    """Ends the command if the file is no whole backup; the registry checks the content."""
    try:
        first, *rest = file.read_text().splitlines()
        body = json.loads(first)
        if body["kind"] != KIND:
            raise ValueError("it is something else")
        header = ParseDict(body["header"], backups_pb2.BackupHeader())
        records = [
            backups_pb2.BackupRecord(key=line["key"], value=b64decode(line["value"], validate=True))
            for line in map(json.loads, rest)
        ]
    except (OSError, ValueError, LookupError, TypeError, ParseError) as error:
        fail(f"{file} is no backup of a registry: {error}")
    hasher = hashlib.sha256()
    for record in records:
        raw = record.SerializeToString(deterministic=True)
        hasher.update(len(raw).to_bytes(8, "big") + raw)
    if hasher.hexdigest() != header.sha256:
        fail(f"{file} is corrupt: its records do not have the SHA-256 of its header")
    return header, records
