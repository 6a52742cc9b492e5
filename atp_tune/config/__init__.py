"""Study files, their keys, and the best configuration. Loads no torch."""
