"""Where everything is in etcd. Under the prefix of a model:

versions/<8 digits>   a ModelVersion without its stage; written once
stages/<8 digits>     a ModelVersion with its stage only; no record: REGISTERED
traffic               a Model with the fields of its traffic and releases only
releases/<8 digits>   a Release
policy, placement, rollout
requests/<id>         the number of the version that this request created; for a day, by lease
cooldown, timer       empty; there as long as the policy's interval or a rollout's wait lasts, by lease
"""

from __future__ import annotations

PREFIX = "/lingqu/"
INSTANCES = f"{PREFIX}instances/"
# The lease of the process that was told to take no new requests; for a day, by a lease of its own.
DRAINED = f"{PREFIX}drained/"
MODELS = f"{PREFIX}models/"
CLIENTS = f"{PREFIX}access/clients/"
REVOKED = f"{PREFIX}access/revoked/"
SHARED_LIMITS = f"{PREFIX}access/limits/"
TIERS = f"{PREFIX}access/tiers/"
ACCESS = f"{PREFIX}access/"
# Keys that were signed, by leases as long as their lives. No part of backups: they say nothing about who may.
KEYS = f"{PREFIX}keys/"
LIMITERS = f"{PREFIX}limiters/"
SESSIONS = f"{LIMITERS}sessions/"
LEAVING = f"{LIMITERS}leaving/"
SHARDS = f"{LIMITERS}shards/"
# Not under PREFIX: nobody needs a copy of it.
LEDGER = "/lingqu-ledger/"
FENCES = f"{LEDGER}fences/"
LEADER = f"{PREFIX}leader"
RESTORING = f"{PREFIX}restoring"
# A random text, written once: who resumes with another one has known another store.
STORE = f"{PREFIX}store"
# Written to see that the watch has come as far as a revision.
MARK = f"{PREFIX}mark"


def model(name: str, *rest: str) -> str:
    return "/".join((f"{MODELS}{name}", *rest))


def version(name: str, number: int) -> str:
    return model(name, "versions", f"{number:08d}")


def stage(name: str, number: int) -> str:
    return model(name, "stages", f"{number:08d}")


def release(name: str, number: int) -> str:
    return model(name, "releases", f"{number:08d}")


def model_of(key: str) -> str:
    """The model that a key under MODELS belongs to."""
    return key.removeprefix(MODELS).partition("/")[0]
