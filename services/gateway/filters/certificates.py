"""Who calls, by a client certificate in place of a key; in the chain only where clients may have one."""

from __future__ import annotations

from importlib import resources
from typing import Any

from services.gateway.filters.chain import fixed, typed
from services.gateway.headers import CERTIFICATE_HEADER, CLIENT_HEADER

# A rule of jwt_authn, which asks for no key. No client can send the header itself: listener.py takes it off.
KNOWN = {
    "match": {
        "prefix": "/",
        "headers": [
            {"name": CERTIFICATE_HEADER, "present_match": True},
            {"name": "authorization", "present_match": True, "invert_match": True},
        ],
    }
}


def named() -> dict[str, Any]:
    """Before keys are asked for."""
    text = resources.files(__package__).joinpath("certificate.lua").read_text()
    config = typed("lua.v3.Lua", {"default_source_code": {"inline_string": text}})
    return {"name": "certificate", "typed_config": config}


def as_client() -> dict[str, Any]:
    """Behind jwt_authn, which takes off every header that it would set."""
    name = {
        "header": {"key": CLIENT_HEADER, "value": f"%REQ({CERTIFICATE_HEADER})%"},
        "append_action": "ADD_IF_ABSENT",
    }
    mutations = {"request_mutations": [{"append": name}, {"remove": CERTIFICATE_HEADER}]}
    return fixed("header_mutation", typed("header_mutation.v3.HeaderMutation", {"mutations": mutations}))
