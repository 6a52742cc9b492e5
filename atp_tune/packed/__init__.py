"""Packed checkpoints: sparse weights without their zeros, on disk and in memory, loaded by transformers."""
