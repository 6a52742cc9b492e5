"""A model that is loaded once and measured with many plans: its dense measurements, and what observes its blocks."""
