"""Helpers below all features: the machine, paths, the cache, registries, base classes of data models."""
