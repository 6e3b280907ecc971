"""What the registry keeps of API keys: an account of those that were signed, and of those taken back, and the
tiers of their clients.

Calls are made with the key of whoever asks, so that the registry decides who may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from lingqu.client import LingquError as RegistryError
from lingqu.registry.v1 import access_pb2
from lingqu.registry.v1.access_pb2_grpc import AccessServiceStub
from services.core.errors import BackendUnavailable, LingquError
from services.core.registry import NO_ANSWER, Registry
from services.gateway.keys import Minted

TIMEOUT_S = 5.0


class Accounts:
    """Raises what the registry answers, and BackendUnavailable if it does not."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def record(self, minted: Minted, created_by: str, authorization: str) -> None:
        key = access_pb2.IssuedKey(
            key_id=minted.key_id,
            client=minted.client,
            models=minted.models,
            admin=minted.admin,
            created_by=created_by,
            create_time=Timestamp(seconds=minted.created),
            expire_time=Timestamp(seconds=minted.expires),
            signing_key_id=minted.signing_key_id,
        )
        await self._call(lambda s: s.RecordKey, access_pb2.RecordKeyRequest(key=key), authorization)

    async def put_into(self, tier: str, client: str, authorization: str) -> None:
        """The client has the limits of the tier from now on."""
        asked = access_pb2.GetClientRequest(name=client)
        known = (await self._call(lambda s: s.GetClient, asked, authorization)).client
        if known.tier != tier:
            known.tier = tier
            changed = access_pb2.SetClientRequest(client=known, expected_revision=known.revision)
            await self._call(lambda s: s.SetClient, changed, authorization)

    async def issued(self, client: str, authorization: str) -> tuple[Sequence[access_pb2.IssuedKey], bool]:
        """All keys, or those of a client; and whether the list is stale."""
        request = access_pb2.ListKeysRequest(client=client)
        answer = await self._call(lambda s: s.ListKeys, request, authorization)
        return answer.keys, answer.stale

    async def revoked(self, authorization: str) -> dict[str, access_pb2.RevokedKey]:
        """By id."""
        request = access_pb2.ListRevokedKeysRequest()
        answer = await self._call(lambda s: s.ListRevokedKeys, request, authorization)
        return {key.key_id: key for key in answer.keys}

    async def revoke(
        self, key: access_pb2.IssuedKey, reason: str, authorization: str
    ) -> access_pb2.RevokedKey:
        """Without an end, the registry takes it for a key as long as any."""
        request = access_pb2.RevokeKeyRequest(key_id=key.key_id, client=key.client, reason=reason)
        if key.HasField("expire_time"):
            request.expire_time.CopyFrom(key.expire_time)
        answer = await self._call(lambda s: s.RevokeKey, request, authorization)
        return answer.key  # type: ignore[no-any-return]

    async def _call(self, method: Callable[[Any], Any], request: Any, authorization: str) -> Any:
        channel = self._registry.channel
        metadata = (("authorization", authorization),)
        try:
            return await method(AccessServiceStub(channel))(request, timeout=TIMEOUT_S, metadata=metadata)
        except grpc.aio.AioRpcError as err:
            if err.code() in NO_ANSWER:
                self._registry.leave(channel)
            raise _relayed(err) from err


def _relayed(err: grpc.aio.AioRpcError) -> LingquError:
    """The registry's own answer, for our caller."""
    said = RegistryError(err)
    if not said.reason:
        return BackendUnavailable(f"the registry does not answer: {err.details() or err.code().name}")
    error = LingquError(str(said))
    error.code, error.reason, error.retry_after_s = said.code, said.reason, said.retry_after_s
    return error
