"""Text from a model in memory, by the `generate` of transformers."""
