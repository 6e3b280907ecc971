"""What figures of a training cost it: `python -m bench.training`. No collector is there, the worst case.

The same steps of a small transformer with and without them, in turn, in one thread."""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
import time

import torch

from bench.report import Target, judged, ratio, row
from pipeline.distributions import distribution, layers
from pipeline.figures import TrainingFigures

PASSES, STEPS = 7, 40
VOCABULARY, WIDTH, LENGTH, BATCH = 1_000, 128, 32, 8


def model() -> torch.nn.Module:
    block = torch.nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
    blocks = torch.nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
    return torch.nn.Sequential(
        torch.nn.Embedding(VOCABULARY, WIDTH), blocks, torch.nn.Linear(WIDTH, VOCABULARY)
    )


def trained(made: torch.nn.Module, figures: TrainingFigures | None) -> tuple[float, float]:
    """Seconds of a step, and of processor time of all threads."""
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    began, used = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(made(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        if figures is not None:
            figures.step(loss, items=tokens.numel(), learning_rate=1e-3)
    return (time.perf_counter() - began) / STEPS, (time.process_time() - used) / STEPS


def main() -> int:
    torch.set_num_threads(1)
    logging.disable()
    made = model()
    number = sum(p.numel() for p in made.parameters())
    found: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    looks = []
    with contextlib.ExitStack() as stack:
        figures = stack.enter_context(TrainingFigures(made, "bench", "http://127.0.0.1:1", every_s=0.2))
        trained(made, figures)
        for _ in range(PASSES):
            found["without"].append(trained(made, None))
            found["with"].append(trained(made, figures))
            began = time.perf_counter()
            for tensors in layers(made.named_parameters()).values():
                distribution(tensors)
            looks.append((time.perf_counter() - began) * 1e3)
    print(
        f"\ntraining: a transformer of {number / 1e6:.1f} million parameters, {BATCH * LENGTH} tokens a step"
    )
    for name, runs in found.items():
        print(row(f"a step {name} figures", [taken * 1e3 for taken, _ in runs], "ms"))
        print(row(f"a step {name} figures, processor time", [used * 1e3 for _, used in runs], "ms"))
    print(row("a look at all parameters, every 30 s", looks, "ms"))
    used = {name: [cpu for _, cpu in runs] for name, runs in found.items()}
    targets = [
        Target("with ÷ without figures, processor time", ratio(used["with"], used["without"]), 1.02, False),
        Target("a look, of the 30 s between two", statistics.median(looks) / 300, 2.0, False, "%"),
    ]
    return judged(targets)


if __name__ == "__main__":
    sys.exit(main())
