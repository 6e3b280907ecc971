"""`GatewayService`: keys and routes, for callers whose key has the admin scope."""

from __future__ import annotations

import asyncio

from google.protobuf.timestamp_pb2 import Timestamp

from lingqu.gateway.v1 import gateway_pb2 as pb
from lingqu.gateway.v1.gateway_pb2_grpc import GatewayServiceServicer
from lingqu.registry.v1 import access_pb2
from services.core.audit import note
from services.core.errors import InvalidInput, PermissionDenied
from services.core.identity import Caller
from services.core.interceptors import Context
from services.gateway.accounts import Accounts
from services.gateway.admin import Conditions, conditions
from services.gateway.ads import Ads
from services.gateway.control import ControlPlane
from services.gateway.convert import to_explanation, to_question, to_routes
from services.gateway.deltas import DataPlane
from services.gateway.explain import explain
from services.gateway.issuers import Issuers
from services.gateway.keys import TTL_DEFAULT_S, PublicKey

AFTER_RETIRING_S = 3_600
DRAIN_GRACE_S = 5.0


class Gateway(GatewayServiceServicer):
    """Answers from what the control plane knows; `ads` knows the Envoys connected to it."""

    def __init__(
        self,
        issuers: Issuers,
        accounts: Accounts,
        control: ControlPlane,
        ads: Ads,
    ) -> None:
        self._issuers = issuers
        self._keys = issuers.ring
        self._accounts = accounts
        self._control = control
        self._ads = ads

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Context) -> pb.CreateKeyResponse:
        caller, authorization = self._admin(context)
        ttl = request.ttl.seconds if request.HasField("ttl") else TTL_DEFAULT_S
        minted = self._keys.mint(request.client, ttl, admin=request.admin, models=request.models)
        note(key_id=minted.key_id)
        if request.tier:
            await self._accounts.put_into(request.tier, minted.client, authorization)
        await self._accounts.record(minted, caller.client, authorization)
        return pb.CreateKeyResponse(
            key=minted.key, key_id=minted.key_id, expire_time=Timestamp(seconds=minted.expires)
        )

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        _, authorization = self._admin(context)
        issued, stale = await self._accounts.issued(request.client, authorization)
        revoked = await self._accounts.revoked(authorization)
        keys = [_key(key, revoked.get(key.key_id)) for key in issued]
        keys.sort(key=lambda key: (key.client, key.create_time.seconds, key.key_id))
        return pb.ListKeysResponse(keys=keys, stale=stale)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Context) -> pb.RevokeKeyResponse:
        _, authorization = self._admin(context)
        issued, _ = await self._accounts.issued("", authorization)
        unknown = access_pb2.IssuedKey(key_id=request.key_id, client=request.client)
        key = next((key for key in issued if key.key_id == request.key_id), unknown)
        revoked = await self._accounts.revoke(key, request.reason, authorization)
        return pb.RevokeKeyResponse(key=_key(key, revoked))

    async def RotateSigningKey(
        self, request: pb.RotateSigningKeyRequest, context: Context
    ) -> pb.RotateSigningKeyResponse:
        caller, _ = self._admin(context)
        self._issuers.rotate(retire=request.retire_all)
        key = ""
        if request.retire_all:  # who has asked must not be locked out
            minted = self._keys.mint(caller.client, AFTER_RETIRING_S, admin=True)
            note(key_id=minted.key_id)
            key = minted.key
        return pb.RotateSigningKeyResponse(signing_keys=self._signing_keys(), key=key)

    async def RetireSigningKey(
        self, request: pb.RetireSigningKeyRequest, context: Context
    ) -> pb.RetireSigningKeyResponse:
        self._admin(context)
        self._issuers.retire(request.key_id)
        return pb.RetireSigningKeyResponse(signing_keys=self._signing_keys())

    async def ListSigningKeys(
        self, request: pb.ListSigningKeysRequest, context: Context
    ) -> pb.ListSigningKeysResponse:
        self._admin(context)
        return pb.ListSigningKeysResponse(signing_keys=self._signing_keys())

    def _signing_keys(self) -> list[pb.SigningKey]:
        return [_signing_key(key) for key in self._keys.published]

    async def DescribeRoutes(
        self, request: pb.DescribeRoutesRequest, context: Context
    ) -> pb.DescribeRoutesResponse:
        self._admin(context)
        version, view, connected = self._control.state()
        current = self._control.snapshots.current
        routes, named = to_routes(view, self._control.judge.breakers.of, await self._seen(), request.model)
        return pb.DescribeRoutesResponse(
            version=version,
            registry_connected=connected,
            routes=routes,
            named_routes=named,
            data_planes=[self._data_plane(plane) for plane in self._ads.planes.values()],
            refused=current.refused if current else {},
            control_planes=[
                pb.ControlPlane(id=one.id, address=one.endpoints.get("grpc", ""), labels=one.labels)
                for one in self._control.gateways
            ],
        )

    async def ExplainRoute(
        self, request: pb.ExplainRouteRequest, context: Context
    ) -> pb.ExplainRouteResponse:
        self._admin(context)
        _, view, _ = self._control.state()
        return to_explanation(explain(view, to_question(request)), self._control.filters)

    async def _seen(self) -> dict[str, Conditions]:
        """What the Envoys on this machine say of their endpoints."""
        planes = [plane for plane in self._ads.planes.values() if plane.admin]
        told = await asyncio.gather(*(conditions(plane.node_id, plane.admin) for plane in planes))
        return {p.node_id: found for p, found in zip(planes, told, strict=True) if found is not None}

    async def DrainDataPlane(
        self, request: pb.DrainDataPlaneRequest, context: Context
    ) -> pb.DrainDataPlaneResponse:
        self._admin(context)
        grace_s = request.grace.ToMilliseconds() / 1000 if request.HasField("grace") else DRAIN_GRACE_S
        if not request.node_id:
            raise InvalidInput("node_id", "is required; DescribeRoutes shows them")
        if not 0 <= grace_s <= 3_600:
            raise InvalidInput("grace", "is at most an hour")
        if request.undo:
            await self._ads.undo_drain(request.node_id)
        else:
            await self._ads.drain(request.node_id, grace_s)
        return pb.DrainDataPlaneResponse(state=self._state(request.node_id))

    def _data_plane(self, plane: DataPlane) -> pb.DataPlane:
        made = _data_plane(plane)
        made.state = self._state(plane.node_id)
        return made

    def _state(self, node_id: str) -> pb.DataPlaneState.ValueType:
        return pb.DataPlaneState.ValueType(int(self._ads.drains.state(node_id)))

    def _admin(self, context: Context) -> tuple[Caller, str]:
        """Who calls, and the `authorization` it called with. Raises Unauthenticated, PermissionDenied."""
        metadata = dict(context.invocation_metadata() or ())
        authorization = str(metadata.get("authorization", ""))
        caller = self._issuers.caller(authorization)
        if not caller.admin:
            raise PermissionDenied(f'the key of "{caller.client}" has no admin scope')
        return caller, authorization


def _key(key: access_pb2.IssuedKey, revoked: access_pb2.RevokedKey | None) -> pb.Key:
    made = pb.Key(
        key_id=key.key_id,
        client=key.client or (revoked.client if revoked else ""),
        models=key.models,
        admin=key.admin,
        created_by=key.created_by,
        create_time=key.create_time if key.HasField("create_time") else None,
        expire_time=key.expire_time if key.HasField("expire_time") else None,
        signing_key_id=key.signing_key_id,
    )
    if revoked is not None:
        made.revoke_time.CopyFrom(revoked.revoke_time)
        made.revoke_reason = revoked.reason
    return made


def _signing_key(key: PublicKey) -> pb.SigningKey:
    state = pb.SigningKey.STATE_NEXT
    if key.signs:
        state = pb.SigningKey.STATE_SIGNING
    elif key.until:
        state = pb.SigningKey.STATE_FORMER
    return pb.SigningKey(
        key_id=key.kid, state=state, expire_time=Timestamp(seconds=key.until) if key.until else None
    )


def _data_plane(plane: DataPlane) -> pb.DataPlane:
    return pb.DataPlane(
        node_id=plane.node_id,
        accepted_versions=plane.accepted,
        last_rejection=plane.last_rejection,
        synced_version=plane.synced,
        rejections=[
            pb.Rejection(
                kind=one.kind, name=one.name, message=one.message, time=Timestamp(seconds=int(one.at))
            )
            for one in plane.rejections.values()
        ],
        ahead=plane.ahead,
    )
