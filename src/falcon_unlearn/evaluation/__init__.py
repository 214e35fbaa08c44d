"""Model to per-sample scores to numbers."""
