"""The command line, the only package that prints. Commands import heavy libraries when they run."""

import os
import sys
from typing import NoReturn

from atp_tune.errors import TrialError, UserError, printable
from atp_tune.utils.system import as_typed, remedy, wait_asleep


def main() -> None:
    """Runs the command line; bad input, or a package that is missing, ends in one line on stderr and exit code 2."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C code would log to stderr what we report in one line
    wait_asleep()
    try:
        from atp_tune.cli.application import run

        sys.exit(run(sys.argv[1:] or ["--help"]))
    except (UserError, TrialError) as error:
        _end(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("atp_tune", *sys.stdlib_module_names):
            raise  # an error in this package
        _end(remedy(error.name))
    except OSError as error:
        if "--install-completion" not in sys.argv:
            raise
        _end(f"--install-completion: {error.filename}: {error.strerror}; see --show-completion")


def _end(message: str) -> NoReturn:
    print(f"error: {as_typed(printable(message))}", file=sys.stderr)
    sys.exit(2)
