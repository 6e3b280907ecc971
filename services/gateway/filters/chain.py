"""How a filter is written: with its configuration, or with one that comes by ECDS and may change at run time.

A listener that changes drains its connections; so whatever the registry can change is a discovered
configuration (https://www.envoyproxy.io/docs/envoy/latest/configuration/overview/extension).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.gateway.clusters import ADS

_PREFIX = "type.googleapis.com/envoy.extensions.filters.http"


def typed(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`kind` is the filter's package and message below envoy.extensions.filters.http."""
    return {"@type": f"{_PREFIX}.{kind}", **config}


def fixed(name: str, config: Mapping[str, Any], *, disabled: bool = False) -> dict[str, Any]:
    """A filter that stays as it is. `disabled`: only routes that say so switch it on."""
    made = {"name": f"envoy.filters.http.{name}", "typed_config": config}
    return {**made, "disabled": True} if disabled else made


def discovered(name: str, *kinds: str, disabled: bool = False) -> dict[str, Any]:
    """A filter whose configuration is the extension `name` of the snapshot, one of `kinds`."""
    urls = [f"{_PREFIX}.{kind}" for kind in kinds]
    made = {"name": name, "config_discovery": {"config_source": ADS, "type_urls": urls}}
    return {**made, "disabled": True} if disabled else made
