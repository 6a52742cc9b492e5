#!/usr/bin/env python3
"""`python tune.py …`: the same as the installed command `atp-tune`."""

from atp_tune.cli import main

if __name__ == "__main__":
    main()
