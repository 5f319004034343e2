"""A training step compiled for hardware that is not here: whether it fits, what it computes and what it sends."""
