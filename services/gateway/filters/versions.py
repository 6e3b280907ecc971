"""Which version of its model a request asks for, and what is done where it has to be told on.

A request says so in the header lingqu-version, in a tensor request's own field, or behind its model's name.
For the last the route says that a script has to run: it moves the wish into that header, and the route is
chosen anew.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from services.core.errors import InvalidInput, LingquError, VersionNotServed, to_rpc_status
from services.core.rest import to_http
from services.gateway.filters.chain import typed
from services.gateway.headers import WANTED_HEADER

REFERENCE, FALLBACK = "lingqu.reference", "lingqu.fallback"
_LUA = "lua.v3.Lua"
# A filter state: the version in a tensor request itself, as a JSON list.
OWN_VERSION = "lingqu.version"


def reference() -> dict[str, Any]:
    """Behind MODEL's filter, and before all that looks at MODEL. Runs only where a route says `asked`, or
    `elsewhere`."""
    texts = {REFERENCE: _source("append", "refuse", "reference"), FALLBACK: _source("fallback")}
    sources = {name: {"inline_string": text} for name, text in texts.items()}
    return {"name": REFERENCE, "typed_config": typed(_LUA, {"source_codes": sources})}


def asked() -> dict[str, Any]:
    """The `typed_per_filter_config` of a route whose requests may have a version behind the model's name."""
    return {REFERENCE: typed("lua.v3.LuaPerRoute", {"name": REFERENCE})}


def elsewhere(fallback: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a route to another model than was asked for: its `typed_per_filter_config`, and its metadata."""
    script = typed("lua.v3.LuaPerRoute", {"name": FALLBACK})
    return {REFERENCE: script}, {REFERENCE: {"fallback": fallback}}


def pinning(script: str = "pin") -> str:
    """The script that puts a route's version into tensor requests, or one that does it among others."""
    return _source("append", "refuse", "pinned", script)


def unserved() -> str:
    """The script that refuses a version that is not served."""
    return _source("append", "refuse", "unserved")


def appending(version: int) -> dict[str, Any]:
    """A filter that puts a version into all tensor requests of a cluster."""
    call = f'append(h, field(2, "{version}"))'
    source = f"{_source('append')}\nfunction envoy_on_request(h)\n  {call}\nend\n"
    config = typed(_LUA, {"default_source_code": {"inline_string": source}})
    return {"name": "envoy.filters.http.lua", "typed_config": config}


def by_version(
    named: dict[str, Any], own: dict[str, Any], refusal: dict[str, Any], otherwise: dict[str, Any]
) -> dict[str, Any]:
    """A matcher by the version asked for in the header, one of `named`, or by the number in a tensor request
    itself, one of `own`; others are refused. Most requests ask for none: they cost one look at each place."""
    wishes = [_asked_in(_HEADER, named, refusal)]
    if own:
        spelt = {f'["{number}"]': branch for number, branch in own.items()}
        wishes.append(_asked_in(_STATE, spelt, refusal))
    return {"matcher": {"matcher_list": {"matchers": wishes}, "on_no_match": otherwise}}


def _asked_in(source: dict[str, Any], known: dict[str, Any], refusal: dict[str, Any]) -> dict[str, Any]:
    tree = {"input": source, "exact_match_map": {"map": known}}
    return {
        "predicate": {"single_predicate": {"input": source, "value_match": _SOME}},
        "on_match": {"matcher": {"matcher_tree": tree, "on_no_match": refusal}},
    }


_HEADER = {
    "name": WANTED_HEADER,
    "typed_config": {
        "@type": "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput",
        "header_name": WANTED_HEADER,
    },
}
_STATE = {
    "name": OWN_VERSION,
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.matching.common_inputs.network.v3.FilterStateInput",
        "key": OWN_VERSION,
    },
}
# More than the brackets and quotes that an empty field leaves.
_SOME = {"safe_regex": {"google_re2": {}, "regex": r""".*[^\[\]"].*"""}}


@cache
def _source(*names: str) -> str:
    found = (resources.files(__package__).joinpath(f"{name}.lua").read_text() for name in names)
    refusals = "".join(f"\n  {name} = {_refusal(error)}," for name, error in _REFUSALS.items())
    return "\n".join(found).replace("--@REFUSALS@", refusals)


# What scripts refuse; they fill the names in.
_REFUSALS: dict[str, LingquError] = {
    "unserved": VersionNotServed("<model>", "<version>"),
    "malformed": InvalidInput(
        WANTED_HEADER, "a version's number or name is needed: 1 to 32 letters, digits and '-'"
    ),
    "contradicted": InvalidInput(WANTED_HEADER, "the request asks for two versions at once"),
}


def _refusal(error: LingquError) -> str:
    """A table of Lua."""
    status, http = to_rpc_status(error), to_http(error)
    code, message = status.code, status.message
    status.ClearField("code")
    status.ClearField("message")
    fields = {
        "message": _quoted(message.encode()),
        "details": _quoted(status.SerializeToString()),
        "body": _quoted(json.dumps(http.body).encode()),
    }
    made = ", ".join(f"{name} = {text}" for name, text in fields.items())
    return f'{{ code = {code}, status = "{http.status}", {made} }}'


def _quoted(text: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in text) + '"'
