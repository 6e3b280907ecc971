"""JSON files that outlive a restart, written whole. One that cannot be read is set aside as `NAME.corrupt`,
and the service starts without it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from services.core.errors import LingquError
from services.core.files import write_secret

log = logging.getLogger(__name__)

T = TypeVar("T")


def write(path: Path, body: Any) -> None:
    """Only its owner can read it. Raises LingquError."""
    try:
        write_secret(path, json.dumps(body, ensure_ascii=False).encode())
    except OSError as err:
        raise LingquError(f"{path} cannot be written: {err.strerror}") from err


def read(path: Path, convert: Callable[[Any], T], nothing: T) -> T:
    """What `convert` makes of the file; `nothing` if there is none, or none that it can use."""
    try:
        return convert(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        log.error("%s cannot be read, and is set aside as %s.corrupt: %r", path, path.name, err)  # noqa: TRY400
    try:
        path.replace(path.with_name(f"{path.name}.corrupt"))
    except OSError:
        log.exception("%s cannot be set aside", path)
    return nothing
