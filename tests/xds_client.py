"""A client that resolves `xds:///…` by itself, in a process of its own: grpc reads GRPC_XDS_BOOTSTRAP once.

`python -m tests.xds_client TARGET`; each line of its input is JSON {"model", "calls", "version"?}, answered
with how often each backend has answered, or which status came."""

from __future__ import annotations

import json
import sys
from collections import Counter

import grpc

from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub


def main(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        stub = InferenceServiceStub(channel)
        for line in sys.stdin:
            asked = json.loads(line)
            version = asked.get("version")
            metadata = (("x-lingqu-model-version", version),) if version else ()
            found: Counter[str] = Counter()
            for _ in range(asked["calls"]):
                request = pb.GenerateRequest(model=asked["model"], prompt="x")
                try:
                    found[stub.Generate(request, metadata=metadata, timeout=10).text] += 1
                except grpc.RpcError as err:
                    found[err.code().name] += 1
                    sys.stderr.write(f"{err.details()}\n")
            print(json.dumps(found), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
