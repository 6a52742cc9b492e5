#!/usr/bin/env python3
"""`python tune.py …`: the same as the installed command `atp-tune`. An older Python must be able to read this file."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    print(
        f"error: needs Python >= 3.11, this is {sys.version_info[0]}.{sys.version_info[1]}; "
        "run it with a newer one, as in: python3.11 tune.py",
        file=sys.stderr,
    )
    sys.exit(2)

from atp_tune.cli import main

if __name__ == "__main__":
    main()
