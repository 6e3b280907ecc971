"""How commands answer: tables for people, JSON for programs."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.markup import escape
from rich.table import Table

from lingqu.cli.connection import out


class Format(enum.StrEnum):
    table = "table"
    json = "json"


Output = Annotated[Format, typer.Option("--output", "-o", help="Table for people, JSON for programs.")]


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Print a table, or `empty` if there are no rows. Cells are text, not markup."""
    found = Table(box=None, header_style="bold")
    for column in columns:
        found.add_column(column)
    for row in rows:
        found.add_row(*(escape(str(cell)) if str(cell) else "–" for cell in row))
    out.print(found if found.row_count else empty)


def as_json(answer: Message | Iterable[Message]) -> None:
    """Print a message, or a list of them, with the names of the protos and fields that are empty."""
    body = plain(answer) if isinstance(answer, Message) else [plain(message) for message in answer]
    print_json(body)


def print_json(body: Any) -> None:
    typer.echo(json.dumps(body, indent=2, ensure_ascii=False))


def when(time: Timestamp) -> str:
    """UTC, to the second."""
    return f"{time.ToDatetime():%Y-%m-%d %H:%M:%S}" if time.ByteSize() else ""


def plain(message: Message) -> Any:
    """A message as dictionaries and lists."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
