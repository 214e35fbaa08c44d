"""Which layer to unlearn at: estimators, their nulls, and trial runs."""
