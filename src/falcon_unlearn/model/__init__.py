"""Finding, splitting, loading and patching a decoder."""
