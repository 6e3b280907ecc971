"""One shard of limits as its owner has it: decides, charges, and says what has to be written down. Pure.

Requests per second are in memory only: a successor waits a second. Requests per minute are admitted against
reservations, which are written down before. Tokens are written down before their report is answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from services.gateway.limits.cells import (
    HANDOVER,
    HANDOVER_TTL_S,
    PAST_MS,
    TOKENS_MS,
    TTL_S,
    Cell,
    CellName,
    Writes,
)
from services.gateway.limits.clock import Moment
from services.gateway.limits.reservations import Reservations
from services.gateway.limits.rules import MINUTE, SECOND, TOKEN_DAY, TOKEN_MINUTE, Kind, Rule
from services.gateway.limits.verdicts import UNLIMITED, Verdict
from services.gateway.limits.window import Window

# Tokens are put together into larger cells once no window of a minute can need the smaller ones, so many at
# once.
SETTLED_MS = MINUTE.length_ms + TOKENS_MS + 20_000
PER_PAST = PAST_MS // TOKENS_MS
TOGETHER = 60

Meter: TypeAlias = dict[Kind, Window]


class Shard:
    """`tenure` tells this ownership from all others. `entries` is what former owners have written."""

    def __init__(self, tenure: str, entries: Mapping[str, bytes], now: Moment) -> None:
        self._tenure = tenure
        self._meters: dict[str, Meter] = {}
        self._reservations = Reservations(tenure)
        self._cells: dict[CellName, Cell] = {}  # of tokens, ours and inherited, not put together yet
        self._dirty: set[CellName] = set()
        self._reporters: dict[str, tuple[int, int]] = {}  # the last batch, and the charge that it was
        self._charged = self._recorded = 0
        self._made = 0
        self._swept = now.steady
        # Nobody can have been admitted later than now by a former owner, who may have admitted all it could.
        self._opens = now.steady if HANDOVER in entries else now.steady + SECOND.length_ms
        self._restore(entries, now)

    def decide(self, rules: Iterable[Rule], now: Moment) -> Verdict | None:
        """All rules or none. None: what is needed has to be written down first, see `due`."""
        steady = now.steady
        refusal: Verdict | None = None
        tightest: Verdict | None = None
        found = [(rule, self._meters.setdefault(rule.key, {})) for rule in rules]
        for rule, meter in found:
            for kind, limit in rule.bounds:
                window = _window(meter, kind)
                used, wait = window.used(steady), 0
                if kind is SECOND and steady < self._opens:
                    used, wait = limit, self._opens - steady
                if used >= limit:
                    wait = max(wait, window.wait(steady, limit))
                    if refusal is None or wait > refusal.wait_ms:
                        refusal = Verdict(0, rule.key, limit, kind.length_ms, 0, wait, kind.tokens)
                    continue
                left = limit - used - (not kind.tokens)
                if tightest is None or left < tightest.remaining:
                    length = kind.length_ms
                    tightest = Verdict(steady, rule.key, limit, length, left, length, kind.tokens)
        if refusal is not None:
            return refusal
        lacking = False
        for rule, meter in found:
            for kind, limit in rule.bounds:
                if kind is MINUTE and not self._reservations.covers(rule.key, now):
                    self._reservations.ask(rule.key, limit, limit - meter[kind].used(steady), now)
                    lacking = True
        if lacking:
            return None
        for rule, meter in found:
            for kind, _ in rule.bounds:
                if not kind.tokens:
                    meter[kind].add(steady, 1)
                if kind is MINUTE:
                    self._reservations.use(rule.key, now)
        return tightest or UNLIMITED

    def take_back(self, rules: Iterable[Rule], admitted: int) -> None:
        """A request that was admitted then does not count. What was reserved for it stays used."""
        for rule in rules:
            meter = self._meters.get(rule.key, {})
            for kind in (SECOND, MINUTE):
                if kind in meter:
                    meter[kind].remove(admitted, 1)

    def charge(self, reporter: str, sequence: int, amounts: Mapping[str, int], now: Moment) -> bool:
        """Tokens by key. False: it has to be written down first, see `due`; asking again charges nothing."""
        known, charged = self._reporters.get(reporter, (-1, 0))
        if sequence <= known:
            return charged <= self._recorded
        self._charged += 1
        self._reporters[reporter] = sequence, self._charged
        name = CellName("t", now.wall // TOKENS_MS, self._tenure)
        cell = self._cells.setdefault(name, Cell())
        cell.reporters[reporter] = sequence
        for key, tokens in amounts.items():
            cell.counts[key] = cell.counts.get(key, 0) + tokens
            meter = self._meters.setdefault(key, {})
            for kind in (TOKEN_MINUTE, TOKEN_DAY):
                _window(meter, kind).add(now.steady, tokens)
        self._dirty.add(name)
        return False

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for `due` to be written."""
        return bool(self._dirty) or self._reservations.urgent

    def due(self, now: Moment) -> Writes:
        """What has to be written; empty if nothing has to. `written` tells that it was."""
        writes = Writes(charged=self._charged)
        for name, cell in self._reservations.due(now).items():
            writes.entries[str(name)] = cell.encoded(), TTL_S["r"]
        for name in self._dirty:
            writes.entries[str(name)] = self._cells[name].encoded(), TTL_S["t"]
        if not self._dirty:
            self._put_together(writes, now)
        return writes

    def written(self, writes: Writes, now: Moment) -> None:
        """`writes` is on record. What was charged since it was due is unwritten still."""
        self._recorded = writes.charged
        for text, (value, _) in writes.entries.items():
            name = CellName.parsed(text)
            if name.kind == "r":
                self._reservations.written(name, Cell.decoded(value), now)
            elif name.kind == "t" and self._cells.get(name) == Cell.decoded(value):
                self._dirty.discard(name)
        for text in writes.forget:
            self._cells.pop(CellName.parsed(text), None)

    def farewell(self, now: Moment) -> Writes:
        """The last that is written when the shard is handed over, after the last decision."""
        writes = Writes()
        for name, cell in self._reservations.settled().items():
            writes.entries[str(name)] = cell.encoded(), TTL_S["r"]
        for name in self._dirty:
            writes.entries[str(name)] = self._cells[name].encoded(), TTL_S["t"]
        seconds = ((key, meter[SECOND]) for key, meter in self._meters.items() if SECOND in meter)
        last = {key: used for key, window in seconds if (used := window.used(now.steady))}
        writes.entries[HANDOVER] = Cell(last).encoded(), HANDOVER_TTL_S
        return writes

    def sweep(self, now: Moment) -> None:
        """Forget keys of which nothing counts; to be called often, it looks once a minute."""
        if now.steady - self._swept >= MINUTE.length_ms:
            self._swept = now.steady
            meters = self._meters.items()
            for key in [k for k, meter in meters if not any(w.used(now.steady) for w in meter.values())]:
                del self._meters[key]

    def _restore(self, entries: Mapping[str, bytes], now: Moment) -> None:
        names = sorted(
            (CellName.parsed(text) for text in entries if text != HANDOVER),
            key=lambda name: name.counts_from(now),
        )
        for name in names:
            cell, since = Cell.decoded(entries[str(name)]), name.counts_from(now)
            for key, count in cell.counts.items():
                meter = self._meters.setdefault(key, {})
                for kind in _RESTORED[name.kind]:
                    _window(meter, kind).add(since, count)
            if name.kind == "t":
                self._cells[name] = cell
                for reporter, sequence in cell.reporters.items():
                    self._reporters[reporter] = max((sequence, 0), self._reporters.get(reporter, (-1, 0)))
        if HANDOVER in entries:
            for key, count in Cell.decoded(entries[HANDOVER]).counts.items():
                _window(self._meters.setdefault(key, {}), SECOND).add(now.steady, count)

    def _put_together(self, writes: Writes, now: Moment) -> None:
        """One large cell instead of many small ones."""
        old = sorted(n for n in self._cells if (n.index + 1) * TOKENS_MS + SETTLED_MS <= now.wall)
        if not old or (old[0].index // PER_PAST + 1) * PAST_MS + SETTLED_MS > now.wall:
            return
        past = old[0].index // PER_PAST
        counts: dict[str, int] = {}
        for name in [n for n in old if n.index // PER_PAST == past][:TOGETHER]:
            for key, count in self._cells[name].counts.items():
                counts[key] = counts.get(key, 0) + count
            writes.forget.append(str(name))
        # Numbered: cells of the same time may come to us in several turns.
        self._made += 1
        name = CellName("d", past, f"{self._tenure}x{self._made}")
        writes.entries[str(name)] = Cell(counts).encoded(), TTL_S["d"]


# Which windows a cell counts in.
_RESTORED = {"r": (MINUTE,), "t": (TOKEN_MINUTE, TOKEN_DAY), "d": (TOKEN_DAY,)}


def _window(meter: Meter, kind: Kind) -> Window:
    window = meter.get(kind)
    if window is None:
        window = meter[kind] = Window(kind.length_ms, kind.step_ms)
    return window
