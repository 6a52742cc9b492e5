"""`tune.py serve`: the dashboard that people watch, and the storage that workers on other machines write to."""
