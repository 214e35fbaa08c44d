"""Formulas: tensors in, loss out, never a model."""
