"""Which models a caller is told of: those that it may call. That it calls no others is the gateway's work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from services.core.access import Client, Record
from services.core.errors import BackendUnavailable
from services.core.patterns import matches
from services.inference.callers import CLIENT_HEADER

# The models that the key is for, with spaces between them; absent: all that its client may call.
KEY_MODELS_HEADER = "x-lingqu-key-models"

# By the headers of a request, whether a model is shown.
Permits: TypeAlias = Callable[[Mapping[str, str]], Callable[[str], bool]]


def everything(headers: Mapping[str, str]) -> Callable[[str], bool]:
    """For those before whom there is no registry."""
    return lambda name: True


def by_records(known: Callable[[], Mapping[str, Record] | None]) -> Permits:
    """`known` gives the registry's records of clients by "client NAME"; None while it has told none, then
    BackendUnavailable is raised. A client without a record may call everything."""

    def permits(headers: Mapping[str, str]) -> Callable[[str], bool]:
        records = known()
        if records is None:
            raise BackendUnavailable("the registry has not said yet who may call what")
        record = records.get(f"client {headers.get(CLIENT_HEADER, '')}")
        of_client = record.models if isinstance(record, Client) else ("*",)
        of_key = tuple(headers.get(KEY_MODELS_HEADER, "*").split())

        def shown(name: str) -> bool:
            return all(any(matches(pattern, name) for pattern in among) for among in (of_client, of_key))

        return shown

    return permits
