"""Measures, prints ratios and fails if one is missed: `make bench`, or `make bench ARGS="tensor text"`."""

from __future__ import annotations

import argparse
import asyncio
import sys

from bench import (
    canary,
    capacity,
    control,
    gateway,
    held,
    metrics,
    peers,
    rest,
    rpc,
    startup,
    streams,
    suite,
    tensor,
    text,
    vectors,
)
from bench.report import Target, judged

OFFSET = 1000
# With parts of their own, not on a running suite.
ALONE = {"startup": startup.measure, "control": control.measure, "streams": streams.measure}
ALONE |= {"rpc": rpc.measure}
MEASURES = {"tensor": tensor.measure, "text": text.measure, "vectors": vectors.measure, "held": held.measure}
MEASURES |= {
    "gateway": gateway.measure,
    "rest": rest.measure,
    "peers": peers.measure,
    "metrics": metrics.measure,
    "capacity": capacity.measure,
    "canary": canary.measure,
}


async def main(names: list[str]) -> int:
    targets: list[Target] = []
    for name in ALONE.keys() & set(names):
        targets += await ALONE[name](OFFSET)
    measures = {name: MEASURES[name] for name in MEASURES if name in names}
    if measures:
        async with suite.running(OFFSET) as running:
            for measure in measures.values():
                targets += await measure(running)
    return judged(targets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    choices = [*ALONE, *MEASURES]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(choices)}; none: all")
    names = parser.parse_args().names or choices
    if unknown := set(names) - set(choices):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    sys.exit(asyncio.run(main(names)))
