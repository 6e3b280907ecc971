"""How a filter is written: with its configuration, or with one that comes by ECDS and may change at run time.

A listener that changes drains its connections; so whatever the registry can change is a discovered
configuration (https://www.envoyproxy.io/docs/envoy/latest/configuration/overview/extension).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.gateway.clusters import ADS

_PREFIX = "type.googleapis.com/envoy.extensions.filters.http"
_STRUCT = "type.googleapis.com/xds.type.v3.TypedStruct"
_CHOICE = "type.googleapis.com/envoy.extensions.common.matching.v3.ExtensionWithMatcher"
# As kinds of `discovered`: what `chosen` makes, and what `nothing` is.
CHOICE = "choice"
COMPOSITE = "composite.v3.Composite"
NOTHING = "filter_chain.v3.FilterChainConfig"
ACTION = "composite.v3.ExecuteFilterAction"


def typed(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`kind` is the filter's package and message below envoy.extensions.filters.http."""
    return {"@type": f"{_PREFIX}.{kind}", **config}


def fixed(name: str, config: Mapping[str, Any], *, disabled: bool = False) -> dict[str, Any]:
    """A filter that stays as it is. `disabled`: only routes that say so switch it on."""
    made = {"name": f"envoy.filters.http.{name}", "typed_config": config}
    return {**made, "disabled": True} if disabled else made


def discovered(name: str, *kinds: str, disabled: bool = False) -> dict[str, Any]:
    """A filter whose configuration is the extension `name` of the snapshot, one of `kinds`."""
    urls = [_CHOICE if kind == CHOICE else f"{_PREFIX}.{kind}" for kind in kinds]
    made = {"name": name, "config_discovery": {"config_source": ADS, "type_urls": urls}}
    return {**made, "disabled": True} if disabled else made


def structured(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """As `typed`, for fields that Envoy knows and xds-protos 1.85 does not; Envoy alone checks them."""
    return {"@type": _STRUCT, "type_url": f"{_PREFIX}.{kind}", "value": config}


def nothing() -> dict[str, Any]:
    """The configuration of no filter at all, for a discovered one that has nothing to do: a chain of none. A
    composite filter that never runs another costs a request 2,000 instructions."""
    return structured(NOTHING, {})


def chosen(
    name: str,
    tree: Callable[[dict[str, Any]], dict[str, Any]],
    chains: Mapping[str, Sequence[dict[str, Any]]],
    *,
    named: bool = False,
) -> dict[str, Any]:
    """A filter that passes a request through one of several chains of filters, by what `tree` looks at, or
    through none. It costs one look-up, however many there are.

    `tree` makes a matcher's tree of branches. If it uses a branch twice, the chains have to be `named`, to
    have one state for both; that costs Envoy six times as much to read (0.7 ms a chain), as all does that
    xds-protos cannot write."""
    if not chains:
        return {"name": name, "typed_config": nothing()}
    kept = {value: {"typed_config": filters} for value, filters in chains.items()}
    if named:
        actions = {value: typed(ACTION, {"filter_chain_name": value}) for value in kept}
        config = matched({"matcher_tree": tree(_run(actions))}, {"named_filter_chains": kept})
    else:
        actions = {value: typed(ACTION, {"filter_chain": filters}) for value, filters in kept.items()}
        composite = {"name": "composite", "typed_config": typed(COMPOSITE, {})}
        matcher = {"matcher_tree": tree(_run(actions))}
        config = {"@type": _CHOICE, "xds_matcher": matcher, "extension_config": composite}
    return {"name": name, "typed_config": config}


def matched(matcher: dict[str, Any], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of a filter that runs the filters which a matcher's action names, or none. It looks
    by itself: a request pays less than where another filter looks for it, as in `chosen`."""
    return structured(COMPOSITE, {"matcher": matcher, **(more or {})})


def _run(actions: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    return {value: {"action": {"name": "chain", "typed_config": it}} for value, it in actions.items()}


def by_header(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    source = {"@type": "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput"}
    tree = {"input": {"name": name, "typed_config": {**source, "header_name": name}}}
    return lambda branches: {**tree, "exact_match_map": {"map": branches}}


def when_present(name: str, header: str, filter_: dict[str, Any]) -> dict[str, Any]:
    """A filter that only requests with that header pass through."""
    source = {"@type": "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput"}
    predicate = {
        "input": {"name": header, "typed_config": {**source, "header_name": header}},
        "value_match": {"safe_regex": {"google_re2": {}, "regex": ".+"}},
    }
    action = {"action": {"name": "run", "typed_config": typed(ACTION, {"typed_config": filter_})}}
    matchers = [{"predicate": {"single_predicate": predicate}, "on_match": action}]
    return {"name": name, "typed_config": matched({"matcher_list": {"matchers": matchers}})}
