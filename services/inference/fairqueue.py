"""Who runs and who waits: the rule of admission, without clock and without tasks.

- At most `slots` are taken and at most `queue` tickets wait. A ticket for several slots gets all at once.
- A free slot goes to a class of priority by stride scheduling: while all three wait, of 21 slots 16 go to
  interactive, 4 to normal and 1 to batch requests; what a class leaves goes to the others in the same ratio.
  A class that comes back has saved nothing up. (C. Waldspurger, W. Weihl: Stride Scheduling, MIT 1995)
- Within a class clients take turns, and a client's tickets keep their order.
- Nobody overtakes the ticket whose turn it is, though it may need more slots than are free yet.
- When the queue is full, its places are shared between clients, whatever priority they claim: who has at
  least two tickets more in it than the one who comes gives up its newest, of its lowest class first.
  Otherwise the one who comes gives up a ticket of a lower class of its own, or is refused.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from enum import Enum

from services.inference.callers import Priority

STRIDES = {Priority.INTERACTIVE: 1, Priority.NORMAL: 4, Priority.BATCH: 16}


class State(Enum):
    """Where a ticket is."""

    NEW = 0
    WAITING = 1
    RUNNING = 2
    GONE = 3


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place. Compared by identity."""

    client: str
    priority: Priority
    slots: int = 1
    state: State = State.NEW


class FairQueue:
    """`taken` slots, `waiting` tickets."""

    def __init__(self, slots: int, queue: int) -> None:
        self._slots = slots
        self._queue = queue
        self._classes: dict[Priority, OrderedDict[str, OrderedDict[Ticket, None]]] = {
            priority: OrderedDict() for priority in Priority
        }
        self._passes = dict.fromkeys(Priority, 0)
        self._now = 0  # the pass of whoever was served last
        self._of_client: Counter[str] = Counter()
        self._lengths = dict.fromkeys(Priority, 0)
        self.taken = 0
        self.waiting = 0

    @property
    def clients(self) -> int:
        """How many clients wait."""
        return len(self._of_client)

    @property
    def idle(self) -> bool:
        return not self.taken and not self.waiting

    def length(self, priority: Priority) -> int:
        """How many tickets of a class wait."""
        return self._lengths[priority]

    def arrive(self, ticket: Ticket) -> Ticket | None:
        """Queue a new ticket. Returns the one that has to go for it, which may be itself, or None. A ticket
        for more slots than there are is for all of them. Call `start` afterwards."""
        ticket.slots = min(ticket.slots, self._slots)
        out = None
        if self.waiting >= self._queue and (self.waiting or not self._fits(ticket)):
            out = self._one_to_go(ticket)
            if out is not ticket:
                self._remove(out)
            out.state = State.GONE
        if out is not ticket:
            self._append(ticket)
        return out

    def start(self) -> list[Ticket]:
        """Those whose turn has come, in order; their slots are taken now."""
        started = []
        while (ticket := self._next()) is not None and self._fits(ticket):
            turns = self._classes[ticket.priority]
            self._remove(ticket)
            if ticket.client in turns:
                turns.move_to_end(ticket.client)
            self._now = self._passes[ticket.priority]
            self._passes[ticket.priority] += ticket.slots * STRIDES[ticket.priority]
            self.taken += ticket.slots
            ticket.state = State.RUNNING
            started.append(ticket)
        return started

    def leave(self, ticket: Ticket) -> None:
        """Give back whatever a ticket has; more than once is as good as once. Call `start` afterwards."""
        if ticket.state is State.WAITING:
            self._remove(ticket)
        elif ticket.state is State.RUNNING:
            self.taken -= ticket.slots
        ticket.state = State.GONE

    def hasten(self, ticket: Ticket, priority: Priority) -> None:
        """Let a ticket that waits go on in a better class, as the last of its client there."""
        if priority >= ticket.priority:
            return
        if ticket.state is State.WAITING:
            self._remove(ticket)
            ticket.priority = priority
            self._append(ticket)
        else:
            ticket.priority = priority

    def _fits(self, ticket: Ticket) -> bool:
        return self.taken + ticket.slots <= self._slots

    def _next(self) -> Ticket | None:
        waiting = [priority for priority in Priority if self._classes[priority]]
        if not waiting:
            return None
        best = min(waiting, key=lambda priority: (self._passes[priority], priority))
        return next(iter(next(iter(self._classes[best].values()))))

    def _append(self, ticket: Ticket) -> None:
        turns = self._classes[ticket.priority]
        if not turns:
            self._passes[ticket.priority] = max(self._passes[ticket.priority], self._now)
        turns.setdefault(ticket.client, OrderedDict())[ticket] = None
        ticket.state = State.WAITING
        self._of_client[ticket.client] += 1
        self._lengths[ticket.priority] += 1
        self.waiting += 1

    def _remove(self, ticket: Ticket) -> None:
        turns = self._classes[ticket.priority]
        del turns[ticket.client][ticket]
        if not turns[ticket.client]:
            del turns[ticket.client]
        self._lengths[ticket.priority] -= 1
        self._of_client[ticket.client] -= 1
        if not self._of_client[ticket.client]:
            del self._of_client[ticket.client]
        self.waiting -= 1

    def _one_to_go(self, ticket: Ticket) -> Ticket:
        longest, length = max(self._of_client.items(), key=lambda item: item[1], default=("", 0))
        if length >= self._of_client[ticket.client] + 2:
            return self._newest(longest) or ticket
        return self._newest(ticket.client, below=ticket.priority) or ticket

    def _newest(self, client: str, below: int = 0) -> Ticket | None:
        """The newest of a client's lowest class, if that is below `below`; any class is below 0."""
        for priority in sorted(Priority, reverse=True):
            if priority > below and (mine := self._classes[priority].get(client)):
                return next(reversed(mine))
        return None
