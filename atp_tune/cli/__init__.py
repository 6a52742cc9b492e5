"""The command line: the only part that prints. Heavy imports wait until a command needs them."""

import os
import sys

from atp_tune.cli.app import app
from atp_tune.errors import TrialError, UserError, printable

SPINS = "10000"  # of libgomp's wait for a thread, instead of millions: costs nothing on idle cores


def main() -> None:
    """Runs the command line; bad input ends in one line on stderr and exit code 2."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C code writes to stderr what we say in one line
    if "OMP_WAIT_POLICY" not in os.environ:  # torch's threads wait for each other by spinning, for too long where
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # other jobs have the cores: several times as long a trial
    try:
        app()
    except (UserError, TrialError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
