"""How much a model can take: what was measured of it, a queueing model, and what follows."""
