"""`GatewayService`: keys and routes, for callers whose key has the admin scope."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from lingqu.gateway.v1 import gateway_pb2 as pb
from lingqu.gateway.v1.gateway_pb2_grpc import GatewayServiceServicer
from services.core.errors import PermissionDenied
from services.core.interceptors import Context
from services.gateway.ads import DataPlane
from services.gateway.keys import TTL_DEFAULT_S, KeyRing
from services.gateway.view import View


class Gateway(GatewayServiceServicer):
    """`state` gives the version, the view it was made of, and whether the registry is connected."""

    def __init__(
        self,
        keys: KeyRing,
        state: Callable[[], tuple[str, View, bool]],
        planes: Callable[[], Iterable[DataPlane]],
    ) -> None:
        self._keys = keys
        self._state = state
        self._planes = planes

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Context) -> pb.CreateKeyResponse:
        self._require_admin(context)
        ttl = request.ttl.seconds if request.HasField("ttl") else TTL_DEFAULT_S
        minted = self._keys.mint(request.client, ttl, admin=request.admin)
        return pb.CreateKeyResponse(
            key=minted.key, key_id=minted.key_id, expire_time=Timestamp(seconds=minted.expires)
        )

    async def DescribeRoutes(
        self, request: pb.DescribeRoutesRequest, context: Context
    ) -> pb.DescribeRoutesResponse:
        self._require_admin(context)
        version, view, connected = self._state()
        return pb.DescribeRoutesResponse(
            version=version,
            registry_connected=connected,
            routes=[
                pb.ModelRoute(
                    model=target.model,
                    version=target.version,
                    percent=target.percent,
                    text_endpoints=target.text_endpoints,
                    tensor_endpoints=target.tensor_endpoints,
                )
                for target in view.targets
            ],
            data_planes=[
                pb.DataPlane(
                    node_id=plane.node_id,
                    accepted_versions=plane.accepted,
                    last_rejection=plane.last_rejection,
                    synced_version=plane.synced,
                )
                for plane in self._planes()
            ],
        )

    def _require_admin(self, context: Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        caller = self._keys.caller(str(metadata.get("authorization", "")))
        if not caller.admin:
            raise PermissionDenied(f'the key of "{caller.client}" has no admin scope')
