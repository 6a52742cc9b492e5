"""The cost of a study, forecast before it runs."""
