"""Which model a request names, read by Envoy out of its message or its JSON body, for routes, allow-lists and
limits to look at.

The name becomes a filter state (`MODEL`), set without any script: Lua for every request cost 6 µs of 45.
Scripts run only where a route asks for one: to answer with the name of a model that is not there, to add a
version to a tensor request, and to keep a stream of tensors to its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from services.core.errors import InvalidInput, ModelNotFound, to_rpc_status
from services.gateway import replies
from services.gateway.descriptors import descriptor_set, extractions
from services.gateway.filters import versions
from services.gateway.filters.chain import fixed, structured, typed

MODEL = "lingqu.model"
# The model of a REST request whose body names none, or cannot be read.
NO_MODEL = "<none>"
REST_METADATA = "lingqu.rest"
LUA = "envoy.filters.http.lua"
PIN, STREAM, PREFIX, UNKNOWN, UNSERVED = "pin", "stream", "prefix", "unknown", "unserved"

_EXTRACTED = "envoy.filters.http.grpc_field_extraction"
_STATE = "set_filter_state"


def of_grpc() -> dict[str, Any]:
    config = {
        "descriptor_set": {"inline_bytes": descriptor_set()},
        "extractions_by_method": extractions(),
    }
    return fixed("grpc_field_extraction", typed("grpc_field_extraction.v3.GrpcFieldExtractionConfig", config))


def of_rest() -> dict[str, Any]:
    """On only where routes.py says so, so that what is no REST request pays nothing. Whatever a client calls
    its JSON is read: curl says that it is a form. What cannot be read is said to name no model, so that
    inference finds none by reading it otherwise."""
    target = {"metadata_namespace": REST_METADATA, "key": "model"}
    nothing = {**target, "value": NO_MODEL}
    selected = {"selectors": [{"key": "model"}], "on_present": target}
    rules = {
        "rules": [{**selected, "on_missing": nothing, "on_error": nothing}],
        "allow_content_types_regex": {"regex": ".*"},
        "allow_empty_content_type": True,
    }
    config = typed("json_to_metadata.v3.JsonToMetadata", {"request_rules": rules})
    return fixed("json_to_metadata", config, disabled=True)


def as_state() -> dict[str, Any]:
    """Has the route chosen anew by the states that the first route sets (`named_by`, `named_in_json`)."""
    return fixed(_STATE, structured(f"{_STATE}.v3.Config", {"clear_route_cache": True}))


def named_by(fields: Iterable[str]) -> dict[str, Any]:
    """The `typed_per_filter_config` of a route whose requests name their model, and its version, in these
    fields: they become MODEL and OWN_VERSION. Looking for all that others have would cost each request."""
    states = zip((MODEL, versions.OWN_VERSION), fields, strict=False)
    return _set({key: f"{_EXTRACTED}:{field}" for key, field in states})


def named_in_json() -> dict[str, Any]:
    """The same for REST."""
    return _set({MODEL: f"{REST_METADATA}:model"})


def _set(sources: Mapping[str, str]) -> dict[str, Any]:
    values = [
        {
            "object_key": key,
            "factory_key": "envoy.string",
            "format_string": {
                "text_format_source": {"inline_string": f"%DYNAMIC_METADATA({source})%"},
                "omit_empty_values": True,
            },
            "skip_if_empty": True,
        }
        for key, source in sources.items()
    ]
    config = structured(f"{_STATE}.v3.Config", {"on_request_headers": values})
    return {f"envoy.filters.http.{_STATE}": config}


def by_model(branches: Mapping[str, Any], *, rest: bool = False) -> dict[str, Any]:
    """A matcher's tree with a branch a model. What came out of a message is a JSON list of all values of the
    field, so that a field that is sent twice is no model's name; what came out of JSON is the name itself."""
    return _tree({name if rest else f'["{name}"]': branch for name, branch in branches.items()})


def by_any_model(branches: Mapping[str, Any]) -> dict[str, Any]:
    """The same for both kinds of requests."""
    return _tree({spelt: branch for name, branch in branches.items() for spelt in (name, f'["{name}"]')})


def state() -> dict[str, Any]:
    """MODEL, for a matcher to look at."""
    kind = "type.googleapis.com/envoy.extensions.matching.common_inputs.network.v3.FilterStateInput"
    return {"name": MODEL, "typed_config": {"@type": kind, "key": MODEL}}


def _tree(branches: Mapping[str, Any]) -> dict[str, Any]:
    return {"input": state(), "exact_match_map": {"map": dict(branches)}}


def scripts() -> dict[str, Any]:
    """Runs the script that a route names (`script`), and none elsewhere."""
    texts = {
        PIN: versions.pinning(),
        STREAM: versions.pinning("stream"),
        PREFIX: source("prefix.lua"),
        UNKNOWN: _unknown(),
        UNSERVED: versions.unserved(),
    }
    sources = {name: {"inline_string": text} for name, text in texts.items()}
    return fixed("lua", typed("lua.v3.Lua", {"source_codes": sources}))


def script(name: str) -> dict[str, Any]:
    """The `typed_per_filter_config` of a route that wants a script."""
    return {LUA: typed("lua.v3.LuaPerRoute", {"name": name})}


def source(file: str) -> str:
    """A script that is beside this module."""
    return resources.files(__package__).joinpath(file).read_text()


def _unknown() -> str:
    invalid = InvalidInput("model", "is missing or malformed: 1 to 64 letters, digits, '.', '_' and '-'")
    status = to_rpc_status(ModelNotFound(""))
    status.ClearField("code")
    status.ClearField("message")
    values = {
        "@INVALID_MESSAGE@": str(invalid),
        "@INVALID_STATUS@": replies.details_header(invalid),
        "@NOT_FOUND_DETAILS@": "".join(f"\\x{byte:02x}" for byte in status.SerializeToString()),
    }
    text = source("unknown.lua")
    for name, value in values.items():
        text = text.replace(name, value)
    return text
