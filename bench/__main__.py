"""Measures, prints ratios and fails if one is missed: `make bench`, or `make bench ARGS="tensor text"`."""

from __future__ import annotations

import argparse
import asyncio
import sys

from bench import startup, suite, tensor, text
from bench.report import Target

OFFSET = 1000


async def main(names: list[str]) -> int:
    targets: list[Target] = []
    if "startup" in names:
        targets += await startup.measure(OFFSET)
    if {"tensor", "text"} & set(names):
        async with suite.running(OFFSET) as running:
            if "tensor" in names:
                targets += await tensor.measure(running)
            if "text" in names:
                targets += await text.measure(running)
    print("\ntargets")
    for target in targets:
        print(target.line())
    return 0 if all(target.met for target in targets) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    choices = ["startup", "tensor", "text"]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(choices)}; none: all")
    names = parser.parse_args().names or choices
    if unknown := set(names) - set(choices):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    sys.exit(asyncio.run(main(names)))
