"""`python -m atp_tune …`: the same as the installed command `atp-tune`."""

from atp_tune.cli import main

main()
