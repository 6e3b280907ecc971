"""Which rules and silences there are: ours, and what somebody has asked for. Changes are on disk first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from services.core.errors import AlreadyExists, InvalidInput, LimitReached, NotFound, NotReady
from services.metrics.alerts.archive import Archive, Wanted
from services.metrics.alerts.defaults import DEFAULTS
from services.metrics.alerts.rules import Rule
from services.metrics.alerts.silences import MAX_SILENCES, Silence

MAX_RULES = 500


class Book:
    """For one event loop. `defaults` are the rules that nobody has to ask for."""

    def __init__(self, archive: Archive, defaults: Sequence[Rule] = DEFAULTS) -> None:
        self._archive = archive
        self._defaults = {rule.name: rule for rule in defaults}
        self._wanted = archive.wanted()
        self._rules = self._effective(self._wanted)
        self._changing = asyncio.Lock()

    def rules(self) -> Mapping[str, Rule]:
        """By name, in order."""
        return self._rules

    def is_default(self, name: str) -> bool:
        return name in self._defaults and name not in self._wanted.rules

    def silences(self, now_ns: int) -> list[Silence]:
        """Those that have not ended, the first to end first."""
        found = (silence for silence in self._wanted.silences.values() if silence.until_ns > now_ns)
        return sorted(found, key=lambda silence: (silence.until_ns, silence.id))

    async def create(self, rule: Rule) -> None:
        """Raises AlreadyExists, LimitReached."""

        def change(wanted: Wanted) -> None:
            if rule.name in wanted.rules:
                raise AlreadyExists(f'there is a rule "{rule.name}"; update it, or choose another name')
            if len(wanted.rules) >= MAX_RULES - len(self._defaults):
                raise LimitReached(f"there are {MAX_RULES} rules, which is the most; delete some")
            wanted.rules[rule.name] = rule
            wanted.disabled.discard(rule.name)

        await self._change(change)

    async def update(self, rule: Rule) -> None:
        """Raises NotFound, InvalidInput."""

        def change(wanted: Wanted) -> None:
            if rule.name in wanted.rules:
                wanted.rules[rule.name] = rule
                return
            default = self._defaults.get(rule.name)
            if default is None:
                raise NotFound(f'there is no rule "{rule.name}"')
            if replace(rule, disabled=False) != default:
                raise InvalidInput(
                    "rule",
                    "is a default one, of which only `disabled` can be changed; "
                    "create a rule of the same name to take its place",
                )
            (wanted.disabled.add if rule.disabled else wanted.disabled.discard)(rule.name)

        await self._change(change)

    async def delete(self, name: str) -> None:
        """Raises NotFound, NotReady."""

        def change(wanted: Wanted) -> None:
            if name not in wanted.rules:
                if name in self._defaults:
                    raise NotReady(f'"{name}" is a default rule: disable it')
                raise NotFound(f'there is no rule "{name}"')
            del wanted.rules[name]

        await self._change(change)

    async def silence(self, silence: Silence) -> None:
        """Raises LimitReached."""

        def change(wanted: Wanted) -> None:
            ended = [found.id for found in wanted.silences.values() if found.until_ns <= silence.created_ns]
            for id_ in ended:
                del wanted.silences[id_]
            if len(wanted.silences) >= MAX_SILENCES:
                raise LimitReached(f"there are {MAX_SILENCES} silences, which is the most; delete some")
            wanted.silences[silence.id] = silence

        await self._change(change)

    async def unsilence(self, id_: str) -> None:
        """Raises NotFound."""

        def change(wanted: Wanted) -> None:
            if wanted.silences.pop(id_, None) is None:
                raise NotFound(f'there is no silence "{id_}"')

        await self._change(change)

    async def _change(self, change: Callable[[Wanted], None]) -> None:
        """Raises what `change` raises, or LingquError if it cannot be written: then nothing has changed."""
        async with self._changing:
            wanted = Wanted(dict(self._wanted.rules), set(self._wanted.disabled), dict(self._wanted.silences))
            change(wanted)
            await asyncio.to_thread(self._archive.keep_wanted, wanted)
            self._wanted, self._rules = wanted, self._effective(wanted)

    def _effective(self, wanted: Wanted) -> Mapping[str, Rule]:
        ours = {
            name: replace(rule, disabled=True) if name in wanted.disabled else rule
            for name, rule in self._defaults.items()
        }
        return dict(sorted({**ours, **wanted.rules}.items()))
