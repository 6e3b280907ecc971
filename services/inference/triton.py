"""The few calls of the Open Inference Protocol that inference makes to its Triton.

Protocol: https://github.com/triton-inference-server/server/blob/main/docs/protocol
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from services.core import tls
from services.core.discovery import VersionKey
from services.core.errors import BackendUnavailable, DeadlinePassed, LingquError, QueueFull
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.tls import Identity
from services.inference.watchdog import Pulse

_DATATYPES = {"int32": "INT32", "int64": "INT64", "float32": "FP32"}
_DTYPES = {name: dtype for dtype, name in _DATATYPES.items()}
LOAD_TIMEOUT_S = 600.0
UNHEALTHY = "is not healthy"  # what Triton says of a model's process that died or does not react
REFUSED_FULL = "Exceeds maximum queue size"
REFUSED_LATE = "Request timeout expired"


class LoadFailed(Exception):
    """Triton refused to load a model; the text is Triton's."""


class Triton:
    def __init__(self, address: str, identity: Identity | None = None) -> None:
        self.address = address
        self._channel = tls.channel(address, CHANNEL_OPTIONS, identity)
        self._pulses: dict[VersionKey, Pulse] = {}
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    def pulse(self, key: VersionKey) -> Pulse:
        """When a version was last heard of, of the requests that `infer` sent."""
        return self._pulses.setdefault(key, Pulse())

    def new_pulse(self, key: VersionKey) -> Pulse:
        """Of a version that was just loaded: nothing that was before counts."""
        self._pulses[key] = Pulse()
        return self._pulses[key]

    async def ready_versions(self) -> set[VersionKey]:
        """What Triton serves now. Raises BackendUnavailable if it is gone, DeadlinePassed if it is slow."""
        try:
            index = await self._stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True), timeout=2.0)
        except grpc.aio.AioRpcError as err:
            if err.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlinePassed("Triton is slow to answer") from err
            raise BackendUnavailable(f"Triton does not answer ({err.details()})") from err
        return {VersionKey(m.name, int(m.version)) for m in index.models if m.version.isdigit()}

    async def load(self, model: str) -> None:
        """Bring Triton in line with the repository for one model: new versions are loaded before old ones
        go. Raises LoadFailed."""
        try:
            request = pb.RepositoryModelLoadRequest(model_name=model)
            await self._stub.RepositoryModelLoad(request, timeout=LOAD_TIMEOUT_S)
        except grpc.aio.AioRpcError as err:
            if err.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise BackendUnavailable("Triton went away while loading") from err
            raise LoadFailed(err.details() or err.code().name) from err

    async def unload(self, model: str) -> None:
        try:
            await self._stub.RepositoryModelUnload(
                pb.RepositoryModelUnloadRequest(model_name=model), timeout=30.0
            )
        except grpc.aio.AioRpcError as err:
            raise BackendUnavailable(f"Triton could not unload {model}: {err.details()}") from err

    async def infer(
        self,
        key: VersionKey,
        inputs: Mapping[str, npt.NDArray[Any]],
        traceparent: str = "",
        timeout: float | None = None,
        priority: int = 0,
    ) -> dict[str, npt.NDArray[Any]]:
        """The output tensors of one request, by name. `timeout` also bounds its time in Triton's queue;
        `priority` is a level of that queue, 1 first, 0 the model's default. Raises QueueFull, DeadlinePassed,
        BackendUnavailable or LingquError."""
        request = pb.ModelInferRequest(model_name=key.model, model_version=str(key.version))
        for name, array in inputs.items():
            tensor = request.inputs.add(name=name, datatype=_DATATYPES[array.dtype.name])
            tensor.shape.extend(array.shape)
            request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
        if timeout is not None:
            # Zero would mean none.
            request.parameters["timeout"].int64_param = max(1, int(timeout * 1e6))
        if priority:
            request.parameters["priority"].uint64_param = priority
        metadata = (("traceparent", traceparent),) if traceparent else ()
        pulse = self.pulse(key)
        try:
            with pulse:
                answer = await self._stub.ModelInfer(request, timeout=timeout, metadata=metadata)
                pulse.heard()
        except grpc.aio.AioRpcError as err:
            if UNHEALTHY in (err.details() or ""):
                pulse.complain()
            elif any(words in (err.details() or "") for words in (REFUSED_FULL, REFUSED_LATE)):
                pulse.heard()
            raise _translated(key, err) from err
        return {
            tensor.name: np.frombuffer(raw, _DTYPES[tensor.datatype]).reshape(tuple(tensor.shape))
            for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }

    def stream(self, requests: AsyncIterator[Any]) -> Any:
        """A ModelStreamInfer call, to be read until it ends."""
        return self._stub.ModelStreamInfer(requests)


def command_request(key: VersionKey, request_id: str, session: bytes) -> Any:
    """A request with the one BYTES tensor of backends/wire.py."""
    request = pb.ModelInferRequest(model_name=key.model, model_version=str(key.version), id=request_id)
    request.inputs.add(name="session", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(session).to_bytes(4, "little") + session)
    return request


def _translated(key: VersionKey, err: grpc.aio.AioRpcError) -> LingquError:
    if err.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlinePassed(f"{key} did not answer before the deadline")
    # What Triton's queue refuses looks like a Triton that is away, but for its words.
    if err.code() == grpc.StatusCode.UNAVAILABLE and REFUSED_FULL in (err.details() or ""):
        return QueueFull(f"too many requests wait for {key}")
    if err.code() == grpc.StatusCode.UNAVAILABLE and REFUSED_LATE in (err.details() or ""):
        return DeadlinePassed(f"the deadline passed while the request waited for {key}")
    if err.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED):
        return BackendUnavailable(f"{key} is not available in Triton at the moment")
    if UNHEALTHY in (err.details() or ""):
        return BackendUnavailable(f"the process of {key} in Triton does not react; it is started again")
    return LingquError(f"{key} failed in Triton: {err.details()}")
