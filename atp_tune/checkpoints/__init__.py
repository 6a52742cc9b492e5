"""Dense checkpoints: finding, downloading, checking and converting them, and placing their weights."""
