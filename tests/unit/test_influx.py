"""What InfluxDB's versions differ in, against an HTTP server that answers as their documentation says.

Only 1.6.7 runs here (tests/contract, tests/chaos): what 2.x and 3.x do is played.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from services.core.errors import BackendUnavailable, LingquError
from services.metrics.points import Point, labels
from services.metrics.queries import Aggregate, Query, Series
from services.metrics.store import PointsRefused, StoreRefusesAccess
from services.metrics.stores.influx import InfluxStore
from services.metrics.stores.influxhttp import Server

START = 1_760_000_000_000_000_000


class Call(NamedTuple):
    method: str
    path: str
    query: dict[str, str]
    body: str
    authorization: str


class Reply(NamedTuple):
    status: int = 204
    document: Any = None
    headers: tuple[tuple[str, str], ...] = ()


_MAPPED = {"id": "1", "orgID": "0123456789abcdef", "bucketID": "fedcba9876543210", "database": "lingqu"}
_MAPPED |= {"retention_policy": "raw", "default": True}


class Fake:
    """`reply` decides; `calls` are what came."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.reply: Callable[[Call], Reply | None] = lambda call: None
        self.version = "1.8.10"
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16

            def answer(self) -> None:
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("content-length") or 0)).decode()
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                call = Call(self.command, url.path, query, body, self.headers.get("authorization", ""))
                fake.calls.append(call)
                reply = fake.reply(call) or fake.usual(call)
                content = b"" if reply.document is None else json.dumps(reply.document).encode()
                self.send_response(reply.status)
                for name, value in reply.headers:
                    self.send_header(name, value)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815

            def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def usual(self, call: Call) -> Reply:
        if call.path == "/ping":
            return Reply(200, {"version": self.version}, (("x-influxdb-version", self.version),))
        if call.path == "/query":
            text = parse_qs(call.body)["q"][0]
            return Reply(200, {"results": [{"statement_id": n} for n, _ in enumerate(text.split("; "))]})
        if call.path == "/api/v2/orgs":
            return Reply(200, {"orgs": [{"id": "0123456789abcdef", "name": "o"}]})
        if call.path == "/api/v2/buckets":
            bucket = {"id": "fedcba9876543210", "orgID": "0123456789abcdef", "retentionRules": []}
            bucket["name"] = "lingqu/raw"
            return Reply(200, {"buckets": []}) if call.method == "GET" else Reply(201, bucket)
        if call.path == "/api/v2/dbrps":
            return Reply(200, {"content": []}) if call.method == "GET" else Reply(201, _MAPPED)
        return Reply()

    def of(self, path: str) -> list[Call]:
        return [call for call in self.calls if call.path == path]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.close()


def some(number: int = 1) -> list[Point]:
    return [Point("m", labels({"k": "v"}), {"value": 1.0}, START + n) for n in range(number)]


QUERY = Query("m", "value", START, START + 10, Aggregate.SUM, group_by=("k",))
ROWS = {
    "results": [
        {"series": [{"name": "m", "tags": {"k": "v"}, "columns": ["time", "sum"], "values": [[0, 2]]}]}
    ]
}


def test_the_first_version_knows_user_and_password(fake: Fake) -> None:
    InfluxStore(Server(fake.url, user="u", password="p")).write(some())
    (call,) = fake.of("/write")
    assert call.query == {"db": "lingqu", "rp": "raw", "precision": "ns"}
    assert call.authorization == "Basic dTpw"
    assert call.body == f"m,k=v value=1.0 {START}"


def test_the_second_version_has_a_bucket_and_a_token(fake: Fake) -> None:
    fake.version = "v2.7.11"
    store = InfluxStore(Server(fake.url, token="t", org="o"))
    store.write(some())
    store.write(some())
    posted = [json.loads(call.body) for call in fake.of("/api/v2/buckets") if call.method == "POST"]
    assert [bucket["name"] for bucket in posted] == ["lingqu/raw"]
    (mapped,) = [json.loads(call.body) for call in fake.of("/api/v2/dbrps") if call.method == "POST"]
    assert (mapped["database"], mapped["retention_policy"]) == ("lingqu", "raw")
    assert mapped["bucketID"] == "fedcba9876543210"
    assert {call.authorization for call in fake.calls} == {"Token t"}
    assert fake.of("/write")[0].query["rp"] == "raw"
    assert not fake.of("/query")
    store.retain(3600)
    rules = json.loads(fake.of("/api/v2/buckets")[-1].body)["retentionRules"]
    assert [rule["everySeconds"] for rule in rules] == [3600 + 86_400]


def test_the_third_version_has_a_database_and_a_token(fake: Fake) -> None:
    fake.version = "3.4.1"
    fake.reply = lambda call: Reply(200, ROWS) if call.path == "/query" else None
    store = InfluxStore(Server(fake.url, token="t"))
    store.write(some())
    assert fake.of("/write")[0].query == {"db": "lingqu", "precision": "ns"}
    assert fake.of("/write")[0].authorization == "Bearer t"
    assert store.query(QUERY) == [Series((("k", "v"),), ((START, 2.0),))]
    assert 'FROM "m" WHERE' in parse_qs(fake.of("/query")[0].body)["q"][0]
    store.retain(3600)
    assert json.loads(fake.of("/api/v3/configure/database")[0].body)["retention_period"] == "90000s"


def test_what_answers_is_no_influxdb(fake: Fake) -> None:
    fake.reply = lambda call: Reply(200, {"hello": "world"})
    with pytest.raises(LingquError, match="no InfluxDB"):
        InfluxStore(Server(fake.url)).write(some())


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_credentials_are_told_and_not_tried_at_once(fake: Fake, status: int) -> None:
    fake.reply = lambda call: (
        Reply(status, {"error": "authorization failed"}) if call.path == "/write" else None
    )
    store = InfluxStore(Server(fake.url))
    for _ in range(20):
        with pytest.raises(
            StoreRefusesAccess, match=r"refuses our credentials .*authorization failed"
        ) as caught:
            store.write(some())
        assert caught.value.retry_after_s is not None
        assert 0 < caught.value.retry_after_s <= 1
    assert len(fake.of("/write")) == 1


def test_the_server_says_when_to_come_back(fake: Fake) -> None:
    busy = Reply(429, {"message": "too many"}, (("retry-after", "0.3"),))
    fake.reply = lambda call: busy if call.path == "/write" and len(fake.of("/write")) == 1 else None
    store = InfluxStore(Server(fake.url))
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="too many"):
            store.write(some())
    assert len(fake.of("/write")) == 1
    store.query(QUERY)  # other paths go on
    while time.monotonic() - began < 5:
        try:
            store.write(some())
            break
        except BackendUnavailable as err:
            threading.Event().wait(err.retry_after_s)
    assert len(fake.of("/write")) == 2
    assert time.monotonic() - began >= 0.3


def test_a_failing_server_is_unavailable(fake: Fake) -> None:
    fake.reply = lambda call: Reply(503, {"error": "warming up"}) if call.path != "/ping" else None
    store = InfluxStore(Server(fake.url))
    with pytest.raises(BackendUnavailable, match="503: warming up"):
        store.write(some())
    with pytest.raises(BackendUnavailable):
        store.query(QUERY)


def test_a_silent_server_is_unavailable(fake: Fake) -> None:
    release = threading.Event()
    fake.reply = lambda call: release.wait(5) and None if call.path == "/query" else None
    fake.version = "3.0.0"
    with pytest.raises(BackendUnavailable, match="no answer in time"):
        InfluxStore(Server(fake.url), read_s=0.1).query(QUERY)
    release.set()


def test_nobody_listens(fake: Fake) -> None:
    with pytest.raises(BackendUnavailable, match="connection refused"):
        InfluxStore(Server("http://127.0.0.1:1")).write(some())


def test_a_bad_line_is_found_where_the_server_does_not_say_which(fake: Fake) -> None:
    """2.x refuses a whole request because of one line."""

    def reply(call: Call) -> Reply | None:
        if call.path == "/write" and "odd" in call.body:
            return Reply(400, {"code": "invalid", "message": "unable to parse 'm odd'"})
        return None

    fake.version, fake.reply = "2.7.1", reply
    points = some(1000)
    points[137] = Point("odd", (), {"value": 1.0}, START)
    points[855] = Point("odd", (), {"value": 2.0}, START)
    with pytest.raises(PointsRefused, match="unable to parse") as caught:
        InfluxStore(Server(fake.url, token="t", org="o")).write(points)
    assert caught.value.number == 2
    kept = [line for call in fake.of("/write") if "odd" not in call.body for line in call.body.split("\n")]
    assert len(kept) == 998
    assert len(fake.of("/write")) < 50


def test_a_server_that_refuses_all_is_not_asked_for_ever(fake: Fake) -> None:
    fake.reply = lambda call: Reply(400, {"error": "no"}) if call.path == "/write" else None
    with pytest.raises(PointsRefused) as caught:
        InfluxStore(Server(fake.url)).write(some(3000))
    assert caught.value.number == 3000
    assert len(fake.of("/write")) < 1000


@pytest.mark.parametrize(
    ("status", "document", "number"),
    [
        (400, {"error": "partial write: unable to parse 'a b': x\nunable to parse 'c d': y dropped=0"}, 2),
        (400, {"error": "partial write: points beyond retention policy dropped=3"}, 3),
        (
            422,
            {
                "code": "unprocessable entity",
                "message": "failure writing points to database: partial write: "
                'field type conflict: input field "v" on measurement "m" is type float dropped=4',
            },
            4,
        ),
        (400, {"error": "partial write of line protocol occurred", "data": [{"line_number": 2}]}, 1),
    ],
)
def test_what_the_server_says_it_refused_is_counted(
    fake: Fake, status: int, document: dict[str, Any], number: int
) -> None:
    fake.reply = lambda call: Reply(status, document) if call.path == "/write" else None
    with pytest.raises(PointsRefused) as caught:
        InfluxStore(Server(fake.url)).write(some(10))
    assert caught.value.number == number
    assert len(fake.of("/write")) == 1


def test_connections_are_kept(fake: Fake) -> None:
    store = InfluxStore(Server(fake.url))
    store.write(some())
    pool = store._http._pool.connection_from_url(fake.url)
    for _ in range(20):
        store.write(some())
        store.query(QUERY)
    assert pool.num_connections == 1
    assert pool.num_requests > 40
