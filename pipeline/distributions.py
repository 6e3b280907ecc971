"""What the parameters of a model look like: a few numbers for each layer.

A layer is a parameter by its name ("blocks.0.attention.weight"). Where there are more than may be told,
parameters with the same beginning of their names are one layer ("blocks.0").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

MAX_LAYERS = 200
SAMPLE = 16_384
"""Quantiles are of so many values of a layer, evenly spread over it; everything else is of all values."""
QUANTILES: Mapping[str, float] = MappingProxyType(
    {"p1": 0.01, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p99": 0.99}
)
OTHERS = "others"
CHUNK = 1 << 22
"""Values that are looked at together: what is computed with them takes a few times their memory."""

Tensor = Any


def layers(parameters: Iterable[tuple[str, Tensor]], most: int = MAX_LAYERS) -> dict[str, list[Tensor]]:
    """At most `most`, in order; what is beyond even by the first part of names is one called "others"."""
    known = list(parameters)
    depth = max((name.count(".") + 1 for name, _ in known), default=1)
    for parts in range(depth, 0, -1):
        found: dict[str, list[Tensor]] = {}
        for name, tensor in known:
            found.setdefault(".".join(name.split(".")[:parts]), []).append(tensor)
        if len(found) <= most:
            return found
    kept = dict(list(found.items())[: most - 1])
    kept[OTHERS] = [tensor for name, some in found.items() if name not in kept for tensor in some]
    return kept


def distribution(tensors: Sequence[Tensor]) -> dict[str, float]:
    """`mean`, `std` (of the population), `min`, `max` and quantiles of the finite values; `zeros` and `nans`
    are shares of all values, 0 to 1, infinities counted with the latter. Empty for no values at all; without
    finite ones there are only the shares."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    total = sum(one.numel() for one in flat)
    if not total:
        return {}
    # One list at the end, so that a device is waited for once.
    parts = torch.stack([_parts(some) for one in flat if one.numel() for some in one.split(CHUNK)]).tolist()
    finite, zeros = (sum(part[n] for part in parts) for n in (0, 1))
    shares = {"zeros": zeros / total, "nans": (total - finite) / total}
    if not finite:
        return shares
    mean = sum(part[2] for part in parts) / finite
    # Of each part about its own mean, put together (Chan, Golub, LeVeque, 1983).
    squares = sum(part[3] + part[0] * (part[2] / part[0] - mean) ** 2 for part in parts if part[0])
    sample = _sample(flat, total)
    found = {"mean": mean, "std": max(0.0, squares / finite) ** 0.5}
    found |= {"min": min(p[4] for p in parts if p[0]), "max": max(p[5] for p in parts if p[0])}
    if sample.numel():
        wanted = torch.tensor(list(QUANTILES.values()), dtype=sample.dtype, device=sample.device)
        found |= dict(zip(QUANTILES, torch.quantile(sample, wanted).tolist(), strict=True))
    return found | shares


def _parts(values: Tensor) -> Tensor:
    """The number of finite values and of zeros; sum, squares about the mean, least and greatest of
    the finite ones."""
    values = values.float() if values.dtype != torch.float64 else values
    finite = torch.isfinite(values)
    number = finite.sum(dtype=torch.float64)
    zeros = (values == 0).sum(dtype=torch.float64)
    kept = torch.where(finite, values, 0.0)
    total = kept.sum(dtype=torch.float64)
    mean = total / number.clamp(min=1)
    squares = torch.where(finite, values - mean, 0.0).square().sum(dtype=torch.float64)
    least = torch.where(finite, values, torch.inf).amin().double()
    most = torch.where(finite, values, -torch.inf).amax().double()
    return torch.stack([number, zeros, total, squares, least, most])


def _sample(flat: Sequence[Tensor], total: int) -> Tensor:
    """Finite values of all tensors, each tensor with its share."""
    step = max(1, -(-total // SAMPLE))
    some = torch.cat([one[::step].float() for one in flat])
    return some[torch.isfinite(some)]
