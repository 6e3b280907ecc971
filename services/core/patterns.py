"""Names with '*', as policies, allow-lists and limits have them."""

from __future__ import annotations


def matches(pattern: str, name: str) -> bool:
    """'*' stands for any text; nothing else is special. Takes linear time, whatever the pattern."""
    first, *rest = pattern.split("*")
    if not rest:
        return name == first
    *middle, last = rest
    if not name.startswith(first):
        return False
    at = len(first)
    for part in middle:
        found = name.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return name.endswith(last) and len(name) - len(last) >= at
