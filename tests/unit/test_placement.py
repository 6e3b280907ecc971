"""Where versions are loaded, as every replica decides by itself."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.core.discovery import FAILED, READY, Hosted, Model, Placement, Replica, Version, VersionKey
from services.inference.placement import desired


def model(name: str = "m", *, placement: Placement = Placement(), **fields: object) -> Model:  # noqa: B008
    versions = tuple(Version(VersionKey(name, n), "file:///x", "0", "tensor", "python") for n in (1, 2, 3, 4))
    return Model(name, versions, ((1, 100),), placement=placement, **fields)  # type: ignore[arg-type]


def replicas(count: int) -> list[Replica]:
    return [
        Replica(f"r{n}", "inference", labels={"zone": "ab"[n % 2], "gpu": "l4" if n < 2 else "none"})
        for n in range(count)
    ]


def numbers(found: list[Version]) -> list[int]:
    return [version.key.version for version in found]


def holders(of: Model, fleet: list[Replica], version: int = 1) -> set[str]:
    return {r.id for r in fleet if version in numbers(desired([of], r, fleet))}


def test_names_shadow_and_what_is_to_be_kept_are_loaded_too() -> None:
    me = Replica("me", "inference")
    assert numbers(desired([model()], me, [])) == [1, 4]
    found = desired([model(shadow=2, aliases={"mine": 3}, placement=Placement(keep=(2, 3)))], me, [])
    assert sorted(numbers(found)) == [1, 2, 3, 4]


def test_what_is_off_line_is_loaded_nowhere_and_is_not_the_candidate() -> None:
    found = model()
    versions = (*found.versions[:3], replace(found.versions[3], offline=True))
    assert numbers(desired([replace(found, versions=versions)], Replica("me", "inference"), [])) == [1, 3]


def test_labels_choose_replicas() -> None:
    fleet = replicas(6)
    assert holders(model(placement=Placement({"zone": "a"})), fleet) == {"r0", "r2", "r4"}
    assert holders(model(placement=Placement({"zone": "a", "gpu": "l4"})), fleet) == {"r0"}
    assert holders(model(placement=Placement({"zone": "moon"})), fleet) == set()


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from(["m", "n", "o"]))
def test_as_many_replicas_as_asked_and_one_that_goes_moves_only_its_own(
    count: int, wanted: int, name: str
) -> None:
    fleet = replicas(count)
    placed = model(name, placement=Placement(replicas=wanted))
    before = holders(placed, fleet)
    assert len(before) == min(wanted, count)
    for gone in fleet:
        rest = [r for r in fleet if r.id != gone.id]
        after = holders(placed, rest)
        assert len(after) == min(wanted, len(rest))
        assert before - {gone.id} <= after


def test_a_replica_that_is_chosen_no_more_keeps_a_version_until_the_others_have_it() -> None:
    placed = model(placement=Placement(replicas=1))
    one, two = replicas(2)
    (first,) = holders(placed, [one, two])
    other = one if first == two.id else two
    ready = (Hosted(VersionKey("m", 1), READY),)
    fleet = [r if r.id == first else replace(r, models=ready) for r in (one, two)]
    assert holders(placed, fleet) == {one.id, two.id}, "the old one still serves"
    fleet = [replace(r, models=ready) for r in (one, two)]
    assert holders(placed, fleet) == {first}
    assert other.id not in holders(placed, fleet)


def test_labels_that_fit_nobody_take_no_serving_version_off() -> None:
    """A misspelt label must not darken a model; a candidate goes at once."""
    ready = (Hosted(VersionKey("m", 1), READY), Hosted(VersionKey("m", 4), READY))
    fleet = [replace(r, models=ready) for r in replicas(4)]
    moon = model(placement=Placement({"zone": "moon"}))
    assert holders(moon, fleet) == {r.id for r in fleet}
    assert holders(moon, fleet, version=4) == set()


def test_serving_versions_move_to_other_labels_without_a_gap() -> None:
    ready = (Hosted(VersionKey("m", 1), READY),)
    fleet = [replace(r, models=ready if r.labels["zone"] == "a" else ()) for r in replicas(4)]
    moved = model(placement=Placement({"zone": "b"}))
    assert holders(moved, fleet) == {"r0", "r1", "r2", "r3"}, "the old ones hold on, the new ones load"
    fleet = [replace(r, models=ready) for r in fleet]
    assert holders(moved, fleet) == {"r1", "r3"}


def test_where_a_replica_refuses_for_good_another_takes_its_place() -> None:
    placed = model(placement=Placement(replicas=1))
    fleet = replicas(3)
    (first,) = holders(placed, fleet)
    refused = (Hosted(VersionKey("m", 1), FAILED, "no such device"),)
    fleet = [replace(r, models=refused) if r.id == first else r for r in fleet]
    after = holders(placed, fleet)
    assert first in after, "it goes on saying why"
    assert len(after) == 2
    retrying = (Hosted(VersionKey("m", 1), FAILED, "bucket away", will_retry=True),)
    fleet = [replace(r, models=retrying) if r.id == first else r for r in fleet]
    assert holders(placed, fleet) == {first}
