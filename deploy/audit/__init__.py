"""Attacks on a study's own private training, by its own code: what clipping bounds, what noise covers, what a model tells."""
