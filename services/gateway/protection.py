"""What keeps a cluster from harm: how much it may hold, how much of it may be retries, and how replicas that
fail are left out for a while. Breakers of whole versions are in breakers.py."""

from __future__ import annotations

from typing import Any

# Per version and protocol, in each gateway. Inference queues 512 requests a version and refuses more itself.
MAX_REQUESTS = 8192

# A replica that is gone is noticed by three requests that do not get through; one that answers is left out
# only after a row of failures that a client with bad requests or short deadlines hardly makes alone. Half of
# the replicas stay whatever they do, and a single one always does.
OUTLIERS: dict[str, Any] = {
    "interval": "1s",
    "base_ejection_time": "2s",
    "max_ejection_time": "60s",
    "max_ejection_percent": 50,
    "split_external_local_origin_errors": True,
    "consecutive_local_origin_failure": 3,
    "enforcing_consecutive_local_origin_failure": 100,
    "consecutive_gateway_failure": 10,
    "enforcing_consecutive_gateway_failure": 100,
    "consecutive_5xx": 20,
    "enforcing_consecutive_5xx": 100,
    # By comparison with the others, those of a second.
    "success_rate_minimum_hosts": 3,
    "success_rate_request_volume": 50,
    "enforcing_success_rate": 100,
    "enforcing_local_origin_success_rate": 100,
}


def circuit_breakers(max_requests: int = 0) -> dict[str, Any]:
    """Beyond these numbers Envoy refuses at once. Half of the requests in progress may be retries, and a
    hundred always: enough for one replica of three to die under load, too few for a storm."""
    most = max_requests or MAX_REQUESTS
    return {
        "thresholds": [
            {
                "max_connections": most,
                "max_pending_requests": most,
                "max_requests": most,
                "retry_budget": {"budget_percent": {"value": 50}, "min_retry_concurrency": 100},
            }
        ]
    }


# A request that is tried again goes elsewhere. Slow start chooses by turns that are due; those of busy
# replicas may be far ahead.
ELSEWHERE: dict[str, Any] = {
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": "type.googleapis.com/"
                "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
            },
        }
    ],
    "host_selection_retry_max_attempts": 50,
}
