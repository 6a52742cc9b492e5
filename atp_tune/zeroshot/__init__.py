"""Accuracy on the tasks of lm-eval, dense against sparse."""
