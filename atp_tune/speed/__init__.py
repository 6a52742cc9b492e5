"""Size and speed of a sparse model against the dense one, on this machine."""
