"""How far a control plane has followed the registry, told to Envoys in the versions of resources.

Versions are digests, the same in every control plane but for routes, which say the shares for which each has
made them (shares.py). Behind each stands the revision at which it was sent.
An Envoy that comes to another control plane tells all it has: one that has not come as far must not roll it
back.
"""

from __future__ import annotations

from dataclasses import dataclass

_STORE = 8  # characters that tell one store from another


@dataclass(frozen=True, slots=True, order=True)
class Progress:
    """A revision of etcd's, in the store of that id; revisions of different stores say nothing together."""

    revision: int = 0
    store: str = ""

    def is_beyond(self, other: Progress) -> bool:
        return self.store == other.store and self.revision > other.revision


NOTHING = Progress()


def progress(revision: int, store_id: str) -> Progress:
    return Progress(revision, store_id.replace("-", "")[:_STORE])


def label(digest: str, at: Progress) -> str:
    """The version of a resource that is sent now."""
    return f"{digest}@{at.store}.{at.revision}" if at.store else digest


def parsed(version: str) -> tuple[str, Progress]:
    """What `label` was made of."""
    digest, _, told = version.partition("@")
    store, _, revision = told.partition(".")
    return digest, Progress(int(revision), store) if revision.isdigit() else NOTHING
