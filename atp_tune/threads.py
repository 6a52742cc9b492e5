"""How torch's threads wait for each other: they sleep soon, so that other jobs on the same cores cost less.

By default libgomp's threads spin for millions of rounds, which makes a trial several times slower if other jobs use the
cores; on idle cores 10,000 rounds are no slower. It reads this once, when torch is imported.
"""

import os
import sys

SPINS = "10000"


def wait_asleep() -> None:
    """Sets it for this process and its children, unless the user did; has no effect once torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
