"""What is asked for and what leaves: study files, their keys, the best configuration. No torch."""
