"""Writes a study to experiment trackers while it runs: `trackers.py` has them, `following.py` what they get."""
