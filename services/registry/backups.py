"""`BackupService`: everything that does not live by a lease, as one checked stream, and back."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable

from lingqu.registry.v1 import backups_pb2 as pb
from lingqu.registry.v1 import rollouts_pb2
from lingqu.registry.v1.backups_pb2_grpc import BackupServiceServicer
from services.core.errors import InvalidInput, Occupied, Restoring
from services.core.interceptors import Context
from services.registry import rollouts
from services.registry.access import REVOKED_FOR_S
from services.registry.backup_records import check
from services.registry.callers import AdmittedCallers
from services.registry.claims import Claim
from services.registry.etcd import Etcd, Put, Record
from services.registry.keyspace import ACCESS, MODELS, PREFIX, RESTORING, REVOKED
from services.registry.mirror import Mirror

FORMAT = 1
MAX_BYTES = 1 << 30
# etcd takes 128 operations and 1.5 MiB a transaction by default.
BATCH_RECORDS, BATCH_BYTES = 100, 1 << 20


class Backups(BackupServiceServicer):
    """A backup is read from the registry's copy, so it can be had while etcd is gone. A restore is many
    transactions: RESTORING is there until the last of them, and keeps all other governance writes out."""

    def __init__(self, etcd: Etcd, mirror: Mirror, callers: AdmittedCallers) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._callers = callers

    async def Backup(self, request: pb.BackupRequest, context: Context) -> AsyncIterator[pb.BackupResponse]:
        if self._mirror.get(RESTORING) is not None:
            raise Restoring(
                "a restore is in progress or was interrupted, what is there is half a state: keep the last "
                "backup, repeat `lingqu registry restore`"
            )
        known = [r for prefix in (ACCESS, MODELS) for r in self._mirror.under(prefix) if _belongs(r)]
        records = [pb.BackupRecord(key=r.key.removeprefix(PREFIX), value=r.value) for r in known]
        header = pb.BackupHeader(
            format=FORMAT,
            store_id=self._mirror.store_id,
            revision=self._mirror.revision,
            records=len(records),
            sha256=digest(records),
            stale=self._mirror.stale,
        )
        header.create_time.GetCurrentTime()
        yield pb.BackupResponse(header=header)
        for batch in batches(records):
            yield pb.BackupResponse(records=batch)

    async def Restore(
        self, request_iterator: AsyncIterator[pb.RestoreRequest], context: Context
    ) -> pb.RestoreResponse:
        self._callers.check_admin(context.invocation_metadata(), "restore a backup")
        overwrite, records = await _received(request_iterator)
        claim = await Claim.made(self._etcd)
        there = [r.key for prefix in (ACCESS, MODELS) for r in (await self._etcd.read(prefix))[0]]
        if there and not overwrite and not claim.interrupted:
            await claim.ended()
            raise Occupied(
                f"the registry holds {len(there)} records already; overwrite is needed to replace them"
            )
        await claim.begun()
        revoked = any(record.key.startswith(REVOKED.removeprefix(PREFIX)) for record in records)
        lease = await self._etcd.grant(REVOKED_FOR_S) if revoked else 0
        # What others refer to comes first: a model's versions before its traffic.
        ordered = sorted(records, key=lambda r: r.key.endswith(("/traffic", "/rollout")))
        for batch in batches(ordered):
            await claim.write([_put(record, lease) for record in batch])
        gone = sorted(set(there) - {PREFIX + record.key for record in records})
        for start in range(0, len(gone), BATCH_RECORDS):
            await claim.write(deletes=gone[start : start + BATCH_RECORDS])
        await self._mirror.reached(await claim.ended())
        return pb.RestoreResponse(records=len(records), removed=len(gone))


def _put(record: pb.BackupRecord, lease: int) -> Put:
    """`lease` is for revoked keys."""
    key = PREFIX + record.key
    if key.startswith(REVOKED):
        return Put(key, record.value, lease)
    if key.startswith(MODELS) and key.endswith("/rollout"):
        rollout = rollouts_pb2.Rollout.FromString(record.value)
        if rollouts.running(rollout):  # its timer is not part of a backup: it must not advance by itself
            rollout.state, rollout.detail = rollouts.ENDED, "ended by a restore"
        return Put(key, rollout.SerializeToString())
    return Put(key, record.value)


async def _received(requests: AsyncIterator[pb.RestoreRequest]) -> tuple[bool, list[pb.BackupRecord]]:
    """All of a backup, checked: (overwrite, records). Raises InvalidInput."""
    header: pb.BackupHeader | None = None
    overwrite, size = False, 0
    records: list[pb.BackupRecord] = []
    async for request in requests:
        if header is None:
            if not request.HasField("header"):
                raise InvalidInput("header", "is required on the first message")
            header, overwrite = request.header, request.overwrite
            if header.format != FORMAT:
                raise InvalidInput(
                    "header.format", f"is {header.format}; this registry reads format {FORMAT}"
                )
        records += request.records
        size += request.ByteSize()
        if size > MAX_BYTES:
            raise InvalidInput("records", f"more than {MAX_BYTES} bytes")
    if header is None:
        raise InvalidInput("header", "is required: nothing was sent")
    if len(records) != header.records:
        raise InvalidInput("records", f"{len(records)} came, the header says {header.records}: cut off?")
    if digest(records) != header.sha256:
        raise InvalidInput("records", "do not have the header's SHA-256: the backup is corrupt")
    check(records)
    return overwrite, records


def digest(records: Iterable[pb.BackupRecord]) -> str:
    hasher = hashlib.sha256()
    for record in records:
        raw = record.SerializeToString(deterministic=True)
        hasher.update(len(raw).to_bytes(8, "big") + raw)
    return hasher.hexdigest()


def batches(records: Iterable[pb.BackupRecord]) -> Iterable[list[pb.BackupRecord]]:
    """As many records together as one transaction takes."""
    batch: list[pb.BackupRecord] = []
    size = 0
    for record in records:
        if batch and (len(batch) >= BATCH_RECORDS or size + record.ByteSize() > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += record.ByteSize()
    if batch:
        yield batch


def _belongs(record: Record) -> bool:
    return not record.lease or record.key.startswith(REVOKED)
