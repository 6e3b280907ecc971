"""Our database in an InfluxDB: made, retained and rolled up as its version does that."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import orjson
from urllib3.exceptions import HTTPError

from services.core.errors import BackendUnavailable, LingquError
from services.metrics.store import StoreRefusesAccess
from services.metrics.stores import influxql
from services.metrics.stores.influxhttp import Answer, Http, Server
from services.metrics.stores.influxql import Table, quoted

log = logging.getLogger(__name__)

RAW, ROLLED_UP = "raw", "rollup"
PROGRESS = "_lingqu"
"""Measurement of ours: until when (s since 1970) all points are rolled up."""
SLACK_S = 86_400
"""How much longer a server keeps raw points than was asked for, so that they are rolled up before."""
_HOUR_NS = 3_600_000_000_000
_GONE = ("database not found", "retention policy not found", "not found: database")


@dataclass(frozen=True, slots=True)
class Database:
    """Raw points from `rolled_ns` on are asked for in `raw`, what is older in `rolled`; 0: all in `raw`."""

    version: int
    raw: Table
    rolled: Table
    rolled_ns: int = 0


class Gone(Exception):
    """The database is not there."""


def ask(http: Http, text: str, database: str = "") -> list[list[dict[str, Any]]]:
    """The rows of every statement's answer. Times are in ns."""
    form = {"q": text, "epoch": "ns"} | ({"db": database} if database else {})
    answer = http.call("POST", "/query", form=form)
    document = answer.document
    if answer.status >= 300 or not isinstance(document, dict):
        raise _error(answer.error, text)
    found = []
    for result in document.get("results", ()):
        if "error" in result:
            raise _error(str(result["error"]), text)
        rows = result.get("series", [])
        if any(row.get("partial") for row in rows):
            raise LingquError(
                "InfluxDB's max-row-limit is below what was asked for: raise it, or set it to 0"
            )
        found.append(rows)
    return found


def _error(said: str, text: str) -> Exception:
    if any(words in said for words in _GONE):
        return Gone(said)
    if "timeout" in said or "limit exceeded" in said or "shutdown" in said or "engine is closed" in said:
        return BackendUnavailable(f"InfluxDB did not answer a query: {said[:300]}")
    log.error("InfluxDB refused %r: %s", text[:500], said[:300])
    return LingquError(f"InfluxDB refused a query: {said[:300]}")


def prepared(http: Http, server: Server) -> Database:
    """Its version found out, our database made if it is not there."""
    version = _version(http.call("GET", "/ping", {"verbose": "true"}))
    name = server.database
    if version == 1:
        database = Database(1, Table(name, RAW), Table(name, ROLLED_UP, rolled_up=True))
        _make_first(http, name)
        return replace(database, rolled_ns=_progress(http, database))
    if version == 2:
        _make_bucket(server, 0)
        return Database(2, Table(name, RAW), Table(name, ROLLED_UP, rolled_up=True))
    http.use_bearer(server.token)
    return Database(version, Table(name, ""), Table(name, "", rolled_up=True))


def _version(answer: Answer) -> int:
    """1, 2 or 3."""
    found = answer.headers.get("x-influxdb-version", "")
    if not found and isinstance(answer.document, dict):
        found = str(answer.document.get("version", ""))
    number = found.lstrip("vV").split(".")[0]
    if not number.isdigit() or int(number) < 1:
        raise LingquError(f"what answers is no InfluxDB, or an unknown one (version {found[:40]!r})")
    return int(number)


def _make_first(http: Http, name: str) -> None:
    """Of 1.x."""
    ask(http, f"CREATE DATABASE {quoted(name)}")
    rows = ask(http, f"SHOW RETENTION POLICIES ON {quoted(name)}")[0]
    known = {value[0] for row in rows for value in row["values"]}
    for policy, role in ((RAW, " DEFAULT"), (ROLLED_UP, "")):
        if policy not in known:
            made = f"CREATE RETENTION POLICY {quoted(policy)} ON {quoted(name)}"
            ask(http, f"{made} DURATION INF REPLICATION 1{role}")


def retain(http: Http, server: Server, database: Database, seconds: int, rolled_up: int) -> None:
    """Have the server forget what is older."""
    name = database.raw.database
    if database.version == 1:
        policies = [(RAW, seconds + SLACK_S)]
        if rolled_up:
            policies.append((ROLLED_UP, rolled_up + SLACK_S))
        for policy, duration in policies:
            shard = "1d" if duration >= 3 * SLACK_S else "1h"
            ask(
                http,
                f"ALTER RETENTION POLICY {quoted(policy)} ON {quoted(name)} "
                f"DURATION {duration}s SHARD DURATION {shard}",
            )
    elif database.version == 2:
        _make_bucket(server, max(seconds, rolled_up) + SLACK_S)
    else:
        wanted = {"db": name, "retention_period": f"{max(seconds, rolled_up) + SLACK_S}s"}
        answer = http.call("POST", "/api/v3/configure/database", body=orjson.dumps(wanted))
        if answer.status == 409:
            answer = http.call("PUT", "/api/v3/configure/database", body=orjson.dumps(wanted))
        if answer.status >= 300:
            raise LingquError(f"InfluxDB 3 refuses to retain for {seconds} s: {answer.error[:300]}")


def roll_up(http: Http, database: Database, until_ns: int) -> Database:
    """Roll up what is older and is not yet, by InfluxQL's SELECT INTO, an hour at a time. Doing it twice, or
    by two collectors, makes the same points."""
    name = database.raw.database
    source, into = f"{quoted(name)}.{quoted(RAW)}", f"{quoted(name)}.{quoted(ROLLED_UP)}"
    known = _progress(http, database)
    for begin, end in _shards(http, name):
        at, last = max(begin, known), min(end, until_ns)
        while at < last:
            before = min(last, at - at % _HOUR_NS + _HOUR_NS)
            ask(http, influxql.roll_up(source, into, at, before), name)
            at = before
    done = max(known, until_ns)
    line = f"{PROGRESS} until={done // 1_000_000_000}"
    answer = http.call("POST", "/write", {"db": name, "rp": ROLLED_UP}, body=line.encode())
    if answer.status >= 300:
        raise LingquError(f"InfluxDB does not take what was rolled up: {answer.error[:300]}")
    return replace(database, rolled_ns=done)


def _progress(http: Http, database: Database) -> int:
    rows = ask(http, f"SELECT max(until) FROM {database.rolled.of(PROGRESS)}")[0]  # noqa: S608
    return int(rows[0]["values"][0][1]) * 1_000_000_000 if rows else 0


def _shards(http: Http, name: str) -> list[tuple[int, int]]:
    """Begin and end of the shards with raw points, the oldest first."""
    found = set()
    for row in ask(http, "SHOW SHARDS")[0]:
        for value in row.get("values", ()):  # none of a database without points
            shard = dict(zip(row["columns"], value, strict=True))
            if (shard["database"], shard["retention_policy"]) == (name, RAW):
                found.add((_ns(shard["start_time"]), _ns(shard["end_time"])))
    return sorted(found)


def _ns(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 1_000_000_000


def _make_bucket(server: Server, seconds: int) -> None:
    """Of 2.x: the bucket that database and policy stand for. 0: keep for ever, if it is new."""
    from influxdb_client import BucketRetentionRules, DBRPCreate, DBRPsService, InfluxDBClient
    from influxdb_client.rest import ApiException

    name = f"{server.database}/{RAW}"
    rules = [BucketRetentionRules(type="expire", every_seconds=seconds)] if seconds else []
    try:
        with InfluxDBClient(server.url, server.token, org=server.org) as client:
            buckets = client.buckets_api()
            bucket = buckets.find_bucket_by_name(name)
            if bucket is None:
                bucket = buckets.create_bucket(bucket_name=name, retention_rules=rules, org=server.org)
            elif seconds:
                bucket.retention_rules = rules
                buckets.update_bucket(bucket)
            mappings = DBRPsService(client.api_client)
            given = {"org_id": bucket.org_id, "db": server.database, "rp": RAW}
            if not mappings.get_dbr_ps(**given).content:
                mappings.post_dbrp(
                    DBRPCreate(
                        bucket_id=bucket.id,
                        org_id=bucket.org_id,
                        database=server.database,
                        retention_policy=RAW,
                        default=True,
                    )
                )
    except ApiException as err:
        kind = StoreRefusesAccess if err.status in (401, 403) else BackendUnavailable
        raise kind(f"InfluxDB's bucket {name} cannot be made: {err.status} {err.reason}") from err
    except HTTPError as err:
        raise BackendUnavailable(f"InfluxDB at {server.url} does not answer: {err}") from err
