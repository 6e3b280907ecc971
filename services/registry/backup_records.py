"""What a record of a backup may be: a key that the keyspace knows, and a value that agrees with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError

from lingqu.registry.v1 import access_pb2, models_pb2, rollouts_pb2
from lingqu.registry.v1 import backups_pb2 as pb
from services.core.errors import InvalidInput
from services.registry import validation

_OF_MODEL = re.compile(
    r"models/(?P<name>[^/]+)/"
    r"(?:(?P<numbered>versions|stages|releases)/(?P<number>[0-9]{8})|(?P<single>traffic|policy|placement|rollout))"
)
_OF_ACCESS = re.compile(r"access/(?P<kind>clients|limits|tiers|revoked)/(?P<name>[^/]+)")


def check(records: Sequence[pb.BackupRecord]) -> None:
    """Raises InvalidInput, naming the first record that is wrong."""
    seen: set[str] = set()
    for index, record in enumerate(records):
        if record.key in seen:
            raise InvalidInput(f"records[{index}].key", f'"{record.key[:80]}" is there twice')
        seen.add(record.key)
        try:
            problem = _problem(record.key, record.value)
        except DecodeError as err:
            raise InvalidInput(f"records[{index}].value", f'"{record.key}" cannot be read') from err
        except InvalidInput as err:
            raise InvalidInput(f"records[{index}].value", f'"{record.key}": {err}') from err
        except _WrongKeyError as err:
            raise InvalidInput(
                f"records[{index}].key", f'"{record.key[:80]}" is no part of a backup'
            ) from err
        if problem:
            raise InvalidInput(f"records[{index}].value", f'"{record.key}" {problem}')


class _WrongKeyError(Exception):
    """The keyspace knows no such key."""


def _problem(key: str, value: bytes) -> str:
    """What is wrong with a value; empty if nothing is. Raises _WrongKeyError, DecodeError, InvalidInput."""
    if found := _OF_MODEL.fullmatch(key):
        _named(validation.model_name, "name", found["name"])
        if found["numbered"]:
            return _numbered(found["numbered"], found["name"], int(found["number"]), value)
        return _single(found["single"], found["name"], value)
    if found := _OF_ACCESS.fullmatch(key):
        if found["kind"] == "clients":
            _named(validation.client_name, "name", found["name"])
            client = validation.client(access_pb2.Client.FromString(value))
            return _agrees("name", client.name, found["name"])
        if found["kind"] == "limits":
            _named(validation.model_name, "model", found["name"])
            shared = validation.shared_limits(access_pb2.SharedLimits.FromString(value))
            return _agrees("model", shared.model, found["name"])
        if found["kind"] == "tiers":
            _named(validation.client_name, "name", found["name"])
            tier = validation.tier(access_pb2.Tier.FromString(value))
            return _agrees("name", tier.name, found["name"])
        _named(validation.key_id, found["name"])
        revoked = access_pb2.RevokedKey.FromString(value)
        for time in ("expire_time", "revoke_time"):
            validation.timestamp(time, getattr(revoked, time))
        return _agrees("key_id", revoked.key_id, found["name"])
    raise _WrongKeyError


def _numbered(kind: str, model: str, number: int, value: bytes) -> str:
    if number < 1:
        raise _WrongKeyError
    if kind == "releases":
        release = models_pb2.Release.FromString(value)
        return _agrees("number", release.number, number)
    version = models_pb2.ModelVersion.FromString(value)
    if kind == "stages":  # has the stage only
        return "" if version.stage in models_pb2.Stage.values() else f"has the unknown stage {version.stage}"
    return _agrees("model", version.model, model) or _agrees("version", version.version, number)


def _single(kind: str, model: str, value: bytes) -> str:
    match kind:
        case "policy":
            validation.policy(models_pb2.Policy.FromString(value))
        case "placement":
            validation.placement(models_pb2.Placement.FromString(value))
        case "rollout":
            return _agrees("model", rollouts_pb2.Rollout.FromString(value).model, model)
        case "traffic":
            traffic = models_pb2.Model.FromString(value)
            return _agrees("name", traffic.name or model, model)
    return ""


def _named(check_name: Any, *args: str) -> None:
    try:
        check_name(*args)
    except InvalidInput as err:
        raise _WrongKeyError from err


def _agrees(field: str, found: object, expected: object) -> str:
    return "" if found == expected else f"has the {field} {str(found)[:80]!r}"
