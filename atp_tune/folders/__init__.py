"""Folders made of a configuration: sparse, slim, packed and fine-tuned checkpoints, and their cards."""
