"""Which model a request names: read out of its message or its JSON body, and put into a header that routes,
allow-lists and limits look at."""

from __future__ import annotations

from importlib import resources
from typing import Any

from services.core.errors import ModelNotFound, to_rpc_status
from services.gateway.descriptors import descriptor_set, extractions
from services.gateway.filters.chain import fixed, typed

REST_METADATA = "lingqu.rest"  # routing.lua reads it


def of_grpc() -> dict[str, Any]:
    config = {
        "descriptor_set": {"inline_bytes": descriptor_set()},
        "extractions_by_method": extractions(),
    }
    return fixed("grpc_field_extraction", typed("grpc_field_extraction.v3.GrpcFieldExtractionConfig", config))


def of_rest() -> dict[str, Any]:
    """On only where routes.py says so, so that what is no REST request pays nothing. Whatever a client calls
    its JSON is read: curl says that it is a form."""
    on_present = {"metadata_namespace": REST_METADATA, "key": "model"}
    rules = {
        "rules": [{"selectors": [{"key": "model"}], "on_present": on_present}],
        "allow_content_types_regex": {"regex": ".*"},
        "allow_empty_content_type": True,
    }
    config = typed("json_to_metadata.v3.JsonToMetadata", {"request_rules": rules})
    return fixed("json_to_metadata", config, disabled=True)


def into_header() -> dict[str, Any]:
    return fixed("lua", typed("lua.v3.Lua", {"default_source_code": {"inline_string": _lua()}}))


def _lua() -> str:
    source = resources.files("services.gateway").joinpath("routing.lua").read_text()
    status = to_rpc_status(ModelNotFound(""))
    status.ClearField("code")
    status.ClearField("message")
    escaped = "".join(f"\\x{byte:02x}" for byte in status.SerializeToString())
    return source.replace("@MODEL_NOT_FOUND_DETAILS@", escaped)
