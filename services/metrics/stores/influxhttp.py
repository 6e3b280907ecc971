"""Calls to an InfluxDB over connections that are kept: what an answer means, and when not to ask again."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import orjson
import urllib3

from services.core.backoff import Backoff
from services.core.errors import BackendUnavailable
from services.metrics.store import StoreRefusesAccess

CONNECT_S, READ_S = 3.0, 30.0
CONNECTIONS = 12
MAX_ERROR = 300  # characters of the server's words that are told on
MAX_RETRY_AFTER_S = 60.0
LOST = "retention policy not found"  # 1.x says so with status 500


@dataclass(frozen=True, slots=True)
class Server:
    """Where an InfluxDB is and how it knows us. 1.x: `user` and `password`; 2.x: `token` and `org`, 3.x:
    `token`."""

    url: str
    database: str = "lingqu"
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    org: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        """None if it is no JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None

    @property
    def error(self) -> str:
        """What the server says is wrong."""
        document = self.document if isinstance(self.document, dict) else {}
        text = document.get("error") or document.get("message") or self.body.decode(errors="replace")
        return str(text).strip() or f"HTTP {self.status}"


class Http:
    """Raises BackendUnavailable for whatever may work later, StoreRefusesAccess for wrong credentials. For as
    long as the server asked for, or with growing pauses after it refused access, it is not asked again."""

    def __init__(self, server: Server, read_s: float = READ_S) -> None:
        self._url = server.url.rstrip("/")
        self._pool = urllib3.PoolManager(
            num_pools=1,
            maxsize=CONNECTIONS,
            timeout=urllib3.Timeout(connect=CONNECT_S, read=read_s),
            retries=False,
        )
        self._headers = _credentials(server)
        self._backoff = Backoff(1.0, MAX_RETRY_AFTER_S)
        self._pauses: dict[str, tuple[float, BackendUnavailable]] = {}
        self._lock = threading.Lock()

    def use_bearer(self, token: str) -> None:
        """InfluxDB 3.x has its own name for the same header."""
        if token:
            self._headers = {"authorization": f"Bearer {token}"}

    def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        form: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """`query` goes into the URL; `form` or `body` is what is sent."""
        self._check(path)
        url = f"{self._url}{path}"
        if query:
            url += "?" + urlencode(query)
        headers = dict(self._headers)
        try:
            if form is not None:
                found = self._pool.request(
                    method, url, fields=dict(form), encode_multipart=False, headers=headers
                )
            else:
                found = self._pool.request(method, url, body=body, headers=headers)
        except urllib3.exceptions.HTTPError as err:
            raise BackendUnavailable(f"InfluxDB at {self._url} does not answer: {_words(err)}") from err
        answer = Answer(found.status, found.headers, found.data)
        self._judge(path, answer)
        return answer

    def close(self) -> None:
        self._pool.clear()

    def _check(self, path: str) -> None:
        """Raises if the server is not to be asked yet."""
        with self._lock:
            for place in ("", path):
                until, error = self._pauses.get(place, (0.0, None))
                left = until - time.monotonic()
                if error is not None and left > 0:
                    again = type(error)(str(error))
                    again.retry_after_s = left
                    raise again

    def _judge(self, path: str, answer: Answer) -> None:
        status = answer.status
        if status in (401, 403):
            error: BackendUnavailable = StoreRefusesAccess(
                f"InfluxDB at {self._url} refuses our credentials ({status}: {answer.error[:MAX_ERROR]}); "
                "correct user and password (1.x) or the token (2.x, 3.x) of the metrics service"
            )
            self._pause("", self._backoff.delay(), error)
            raise error
        if status == 429 or (status >= 500 and LOST not in answer.error):
            error = BackendUnavailable(
                f"InfluxDB at {self._url} cannot now ({status}: {answer.error[:MAX_ERROR]})"
            )
            if (seconds := _retry_after(answer.headers.get("retry-after", ""))) is not None:
                self._pause(path, seconds, error)
            raise error
        with self._lock:
            self._backoff.reset()

    def _pause(self, place: str, seconds: float, error: BackendUnavailable) -> None:
        error.retry_after_s = seconds
        with self._lock:
            self._pauses[place] = time.monotonic() + seconds, error


def _credentials(server: Server) -> dict[str, str]:
    if server.token:
        return {"authorization": f"Token {server.token}"}
    if server.user:
        return dict(urllib3.make_headers(basic_auth=f"{server.user}:{server.password}"))
    return {}


def _retry_after(header: str) -> float | None:
    """Seconds; dates are not understood, InfluxDB sends none."""
    try:
        return min(MAX_RETRY_AFTER_S, max(0.0, float(header)))
    except ValueError:
        return None


def _words(err: Exception) -> str:
    """Without the objects that urllib3 names."""
    if isinstance(err, urllib3.exceptions.NewConnectionError):
        return "connection refused" if "refused" in str(err) else str(err).rpartition(": ")[2]
    if isinstance(err, urllib3.exceptions.ConnectTimeoutError):
        return f"no connection within {CONNECT_S:g} s"
    if isinstance(err, urllib3.exceptions.ReadTimeoutError):
        return "no answer in time"
    return str(err)[:MAX_ERROR]
