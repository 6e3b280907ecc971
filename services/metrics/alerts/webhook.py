"""Notifications to an HTTP receiver, as Alertmanager sends them (webhook, version 4).

https://prometheus.io/docs/alerting/latest/configuration/#webhook_config: what receives from Alertmanager can
receive from here. With a secret a header says who sent it and when:
`x-lingqu-signature: t=SECONDS,v1=HEX`, where HEX is HMAC-SHA256 over `SECONDS.BODY`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import urllib3

from services.core.errors import BackendUnavailable
from services.metrics.alerts.notices import Notice, Notification

CONNECT_S, READ_S = 3.0, 10.0
RECEIVER = "lingqu"
SIGNATURE = "x-lingqu-signature"
NEVER = "0001-01-01T00:00:00Z"  # how Alertmanager says that an alert has not ended


class WebhookFailed(BackendUnavailable):
    """The receiver did not take it. `answered`: it said so itself, and may take others."""

    reason = "WEBHOOK_FAILED"

    def __init__(self, message: str, *, answered: bool = False) -> None:
        super().__init__(message)
        self.answered = answered


@dataclass(frozen=True, slots=True)
class Target:
    """Where to, and how the receiver knows us. `external_url` is where people look further."""

    url: str = field(repr=False)
    token: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    external_url: str = ""


class Webhook:
    """Blocks; it is called from a thread of its own. Follows no redirects and tries once."""

    def __init__(self, target: Target, read_s: float = READ_S, now: Callable[[], float] = time.time) -> None:
        self._target, self._now = target, now
        # It would write paths to the log at DEBUG, and a webhook's path is often its secret.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)
        self._pool = urllib3.PoolManager(
            num_pools=1,
            maxsize=1,
            timeout=urllib3.Timeout(connect=CONNECT_S, read=read_s),
            retries=False,
        )

    def send(self, notification: Notification) -> int:
        """The status of HTTP, 2xx. Raises WebhookFailed; its text names neither URL nor secret."""
        body = json.dumps(payload(notification, self._target.external_url), ensure_ascii=False).encode()
        headers = {"content-type": "application/json", "user-agent": "lingqu"}
        if self._target.token:
            headers["authorization"] = f"Bearer {self._target.token}"
        if self._target.secret:
            headers[SIGNATURE] = signature(self._target.secret, body, int(self._now()))
        try:
            # What it answers is not read: it may have no end.
            answer = self._pool.request(
                "POST", self._target.url, body=body, headers=headers, redirect=False, preload_content=False
            )
            answer.close()
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as err:
            raise WebhookFailed(f"the webhook does not answer ({type(err).__name__})") from err
        if not 200 <= answer.status < 300:
            raise WebhookFailed(f"the webhook answered HTTP {answer.status}", answered=True)
        return int(answer.status)

    def close(self) -> None:
        self._pool.clear()


def signature(secret: str, body: bytes, at_s: int) -> str:
    digest = hmac.new(secret.encode(), str(at_s).encode() + b"." + body, hashlib.sha256)
    return f"t={at_s},v1={digest.hexdigest()}"


def payload(notification: Notification, external_url: str = "") -> dict[str, Any]:
    alerts = [
        *(_alert(notice, "firing", external_url) for notice in notification.firing),
        *(_alert(notice, "resolved", external_url) for notice in notification.resolved),
    ]
    labels = {"alertname": notification.group}
    return {
        "version": "4",
        "groupKey": f'{{}}:{{alertname="{notification.group}"}}',
        "truncatedAlerts": 0,
        "status": "firing" if notification.firing else "resolved",
        "receiver": RECEIVER,
        "groupLabels": labels,
        "commonLabels": _common([alert["labels"] for alert in alerts]),
        "commonAnnotations": _common([alert["annotations"] for alert in alerts]),
        "externalURL": external_url,
        "alerts": alerts,
    }


def _alert(notice: Notice, status: str, external_url: str) -> dict[str, Any]:
    return {
        "status": status,
        "labels": dict(notice.labels),
        "annotations": {"summary": notice.summary, "value": f"{notice.value:.6g}"},
        "startsAt": _when(notice.starts_ns),
        "endsAt": _when(notice.ends_ns) if notice.ends_ns else NEVER,
        "generatorURL": external_url,
        "fingerprint": notice.fingerprint,
    }


def _common(found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {name: value for name, value in found[0].items() if all(one.get(name) == value for one in found)}


def _when(ns: int) -> str:
    seconds, rest = divmod(ns, 1_000_000_000)
    at = datetime.fromtimestamp(seconds, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{rest // 1_000_000:03d}Z"
