"""Whose keys are taken: our own ring's, and other issuers'. Who administers the gateway needs one of ours."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from services.core.access import Access
from services.core.errors import ClientDisabled, KeyRevoked
from services.core.files import write_secret, write_whole
from services.core.identity import Caller
from services.core.tasks import background
from services.gateway.filters.authentication import Issuer
from services.gateway.keys import KeyRing, Minted
from services.gateway.providers import Fetched, Provider

log = logging.getLogger(__name__)

# How soon a rotation by another process on the same files is seen.
LOOK_S = 0.5
DEV = "dev"


class Issuers:
    """`changed` is called when Envoy has to know of other keys. `jwks` is a file for services that know
    callers by our keys, `dev_key` one for an admin key, or None. `access` tells who is refused all the same;
    it is kept current from outside."""

    def __init__(
        self,
        ring: KeyRing,
        jwks: Path,
        dev_key: Path | None,
        providers: Sequence[Provider] = (),
        *,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.ring = ring
        self._jwks_file = jwks
        self._dev_key = dev_key
        self.access = Access()
        self._changed = changed
        self._fetched = [Fetched(provider, jwks.parent / "issuers", changed) for provider in providers]
        self.dev: Minted | None = None  # what is in dev_key
        self._publish()

    def follow(self, access: Access) -> None:
        """Whoever that refuses is refused from now on."""
        self.access = access

    @property
    def jwks(self) -> Mapping[str, Any]:
        """Our own public keys."""
        return self.ring.jwks()

    @property
    def others(self) -> tuple[Issuer, ...]:
        """Those whose public keys are known."""
        return tuple(issuer for fetched in self._fetched if (issuer := fetched.issuer) is not None)

    def watching(self) -> AbstractAsyncContextManager[None]:
        return background(self._look(), *(fetched.run() for fetched in self._fetched))

    def caller(self, authorization: str) -> Caller:
        """Who administers with this `authorization` value. Raises Unauthenticated and its kinds."""
        caller = self.ring.caller(authorization)
        if any(key.key_id == caller.key_id for key in self.access.revoked):
            raise KeyRevoked(f'the key {caller.key_id} of client "{caller.client}" is revoked')
        if any(client.disabled and client.name == caller.client for client in self.access.clients):
            raise ClientDisabled(f'client "{caller.client}" is disabled')
        return caller

    def of(self, metadata: Iterable[tuple[str, Any]]) -> Caller:
        """The same of a call's metadata."""
        return self.caller(str(dict(metadata).get("authorization", "")))

    def rotate(self, *, retire: bool = False) -> None:
        """As KeyRing.rotate; everybody is told."""
        self.ring.rotate(retire=retire)
        self._publish()

    def retire(self, kid: str) -> None:
        """As KeyRing.retire; everybody is told."""
        self.ring.retire(kid)
        self._publish()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self.ring.reload():
                    self._publish()
            except (OSError, ValueError) as err:
                log.error("the signing keys cannot be read; those that were there count: %s", err)  # noqa: TRY400

    def _publish(self) -> None:
        write_whole(self._jwks_file, json.dumps(self.jwks).encode())
        self._changed()
        kids = [key.kid for key in self.ring.published]
        if self._dev_key is not None and (self.dev is None or self.dev.signing_key_id not in kids):
            self.dev = self.ring.mint(DEV, admin=True)
            write_secret(self._dev_key, self.dev.key.encode())
