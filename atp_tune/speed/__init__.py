"""Size and speed of a sparse model against the dense one, on the machine that is at hand."""
