"""What is done block by block: running, measuring, pruning."""
