"""The two ways a run can go wrong that are not bugs: what a user gave, and what a trial came to."""


class UserError(Exception):
    """Bad input in one line: what is wrong, where, what to do. The command line prints it and exits with 2."""


class TrialError(Exception):
    """A trial that gives no usable value: it is recorded as failed with this reason, and the study goes on."""
