"""How an Envoy ends without ending a call: its health fails, clients are told to go elsewhere (GOAWAY), and
what is in progress gets its time.

`python -m deploy.local.drain ADMIN` is for a cluster, before it stops an Envoy."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import urllib.request

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ACTIVE = "http.public.downstream_rq_active"
PROBE_S = 0.05


async def drain(admin: str, grace_s: float, calls_s: float) -> int:
    """`admin` is "host:port" of Envoy's admin interface. Health fails for `grace_s` before connections are
    told to go; calls have `calls_s` to end. Returns how many are left: none of an Envoy that is gone."""
    try:
        await _post(admin, "healthcheck/fail")
        await asyncio.sleep(grace_s)
        await _post(admin, "drain_listeners?graceful&skip_exit")
        end = time.monotonic() + calls_s
        while True:
            left = await _active(admin)
            if not left or time.monotonic() > end:
                return left
            await asyncio.sleep(PROBE_S)
    except OSError:
        return 0


async def _active(admin: str) -> int:
    """Calls in progress."""
    found = json.loads(await _get(admin, f"stats?format=json&filter=^{ACTIVE}$"))["stats"]
    return int(next((stat["value"] for stat in found if stat.get("name") == ACTIVE), 0))


async def _get(admin: str, path: str, method: str = "GET") -> bytes:
    request = urllib.request.Request(f"http://{admin}/{path}", method=method)

    def answered() -> bytes:
        with _DIRECT.open(request, timeout=2) as answer:
            return bytes(answer.read())

    return await asyncio.to_thread(answered)


async def _post(admin: str, path: str) -> None:
    await _get(admin, path, "POST")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("admin", help="host:port of Envoy's admin interface")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds for load balancers to notice")
    parser.add_argument("--calls", type=float, default=300.0, help="seconds for calls in progress")
    asked = parser.parse_args()
    raise SystemExit(1 if asyncio.run(drain(asked.admin, asked.grace, asked.calls)) else 0)
