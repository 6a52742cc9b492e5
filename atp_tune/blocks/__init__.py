"""Running, measuring and pruning a model block by block."""
