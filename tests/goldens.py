"""Snapshots that somebody has looked at, kept as YAML to compare with.

One is kept whole, the others as what is different in them. What is long and says nothing to who reads it, a
script or a descriptor, is there by its digest, or by a name where it is not the same each time; what is there
twice is written once (an anchor is the digest of its content)."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.gateway import xds
from services.gateway.snapshot import Snapshot
from tests.statics import as_dict

FOLDER = Path(__file__).parent / "unit" / "goldens"
RENEW = "make test ARGS='-n 0 --renew-goldens tests/unit/test_golden_snapshots.py'"
KINDS = {kind.rpartition(".")[2]: kind for kind in xds.MESSAGES}
_LONG = 120  # characters of a text that is told by its digest
_REPEATED = 100  # characters of JSON that are written once
_MOST_LINES = 200
_TYPE, _PREFIX = "@type", "type.googleapis.com/"


class Told:
    """A snapshot as it is written. `named`: texts that are not the same each time, by their names."""

    def __init__(self, made: Snapshot, named: Mapping[str, str]) -> None:
        self._texts = {f"‹{name}›": text for name, text in named.items()}
        self._named = {text: name for name, text in self._texts.items()}
        found = {name: as_dict(made, kind) for name, kind in KINDS.items() if made.resources[kind]}
        self.value: dict[str, Any] = self._told(json.loads(json.dumps(found)))

    def _told(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._told(v.removeprefix(_PREFIX) if k == _TYPE else v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._told(inner) for inner in value]
        if not isinstance(value, str) or len(value) <= _LONG:
            return value
        if value not in self._named:
            digest = hashlib.sha256(value.encode()).hexdigest()[:16]
            self._named[value] = f"‹{len(value)} characters, SHA-256 {digest}›"
            self._texts[self._named[value]] = value
        return self._named[value]

    def meant(self, written: Any) -> Any:
        """What is written, with the texts themselves, as Envoy takes it. Raises KeyError for one that the
        snapshot does not have."""
        if isinstance(written, dict):
            return {k: self.meant(_PREFIX + v if k == _TYPE else v) for k, v in written.items()}
        if isinstance(written, list):
            return [self.meant(inner) for inner in written]
        if isinstance(written, str) and written.startswith("‹"):
            return self._texts[written]
        return written


def compared(name: str, told: Told, base: Any = None, *, renew: bool = False) -> Any:
    """The golden of that name, which has to be what was told; or becomes it. `base`: the one that it is kept
    as differences from. Fails with what is different in the file."""
    path = FOLDER / f"{name}.yaml"
    now = _written(told.value if base is None else list(_changes(base, told.value)))
    if renew:
        path.parent.mkdir(exist_ok=True)
        path.write_text(now)
    kept = path.read_text() if path.exists() else ""
    if kept != now:
        lines = list(
            difflib.unified_diff(kept.splitlines(), now.splitlines(), str(path.name), "now", n=6, lineterm="")
        )
        rest = [f"… and {len(lines) - _MOST_LINES} more lines"] if len(lines) > _MOST_LINES else []
        shown = "\n".join([*lines[:_MOST_LINES], *rest])
        pytest.fail(f"the snapshot is not the golden one. If that is wanted: {RENEW}\n{shown}", pytrace=False)
    golden = yaml.safe_load(kept)
    return golden if base is None else _changed(base, golden)


def _changes(base: Any, other: Any, at: tuple[str | int, ...] = ()) -> Iterator[dict[str, Any]]:
    """Each is a place, and what is there `now`, if anything is. A list of another length has changed as a
    whole."""
    if isinstance(base, dict) and isinstance(other, dict):
        for key in sorted(base.keys() | other.keys()):
            if key not in other:
                yield {"at": [*at, key]}
            elif key not in base:
                yield {"at": [*at, key], "now": other[key]}
            else:
                yield from _changes(base[key], other[key], (*at, key))
    elif isinstance(base, list) and isinstance(other, list) and len(base) == len(other):
        for index, (one, another) in enumerate(zip(base, other, strict=True)):
            yield from _changes(one, another, (*at, index))
    elif base != other:
        yield {"at": [*at], "now": other}


def _changed(base: Any, changes: list[dict[str, Any]]) -> Any:
    made = copy.deepcopy(base)
    for change in changes:
        *way, last = change["at"]
        place = made
        for step in way:
            place = place[step]
        if "now" in change:
            place[last] = change["now"]
        else:
            del place[last]
    return made


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    def generate_anchor(self, node: yaml.Node) -> str:
        """Numbers would all change with the first."""
        text = yaml.serialize(node, Dumper=yaml.SafeDumper)
        return "x" + hashlib.sha256(text.encode()).hexdigest()[:8]


def _written(value: Any) -> str:
    once = _once(value, {})
    return str(yaml.dump(once, Dumper=_Dumper, width=130, default_flow_style=None, allow_unicode=True))


def _once(value: Any, known: dict[str, Any]) -> Any:
    """The same, with what is equal and large being one object."""
    if isinstance(value, dict):
        value = {key: _once(inner, known) for key, inner in value.items()}
    elif isinstance(value, list):
        value = [_once(inner, known) for inner in value]
    else:
        return value
    text = json.dumps(value, sort_keys=True)
    return known.setdefault(text, value) if len(text) >= _REPEATED else value
