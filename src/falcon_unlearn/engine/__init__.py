"""Gradient combination, optimisers, the training loop and its checkpoints."""
