"""Commands and Python of a page in a plain installation, each in a process forked from this one, which imports once.

    python -P plainly.py    the Python of an environment that has no package of the tests

Reads from stdin a JSON object: `before`, Python that is run once, and `steps`, each a list of words, or Python as a
text. Prints a list of [exit code, stdout, stderr]. Of `serve` the dashboard is asked, then it gets a Ctrl-C.
"""

import json
import os
import re
import signal
import sys
import traceback
from tempfile import TemporaryFile
from time import monotonic, sleep
from typing import IO, NoReturn
from urllib.request import ProxyHandler, build_opener

from atp_tune.cli import main
from atp_tune.cli.terminal import quiet

HANGS = 600
HEARD = re.compile(r"dashboard: +(http://\S+)")


def answer(step: list[str] | str) -> tuple[int, str, str]:
    """The exit code of a step, and what it wrote."""
    with TemporaryFile() as said, TemporaryFile() as out, TemporaryFile() as err:
        said.write(b"Hello\n")
        said.seek(0)
        if (process := os.fork()) == 0:
            become(step, said, out, err)
        if step[0] == "serve":
            visit(process, out)
        _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status), written(out), written(err)


def become(step: list[str] | str, *streams: IO[bytes]) -> NoReturn:
    """Runs a step as this process, and ends."""
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
    sys.stdin, code = open(0), 0  # noqa: SIM115
    try:
        if isinstance(step, str):
            exec(compile(step, "the page", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = ["tune.py", *step]
            main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def visit(process: int, out: IO[bytes]) -> None:
    """Asks the dashboard that a process serves for its studies, and stops it."""
    over = monotonic() + HANGS
    while (found := HEARD.search(written(out))) is None:
        if monotonic() > over or os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        sleep(0.05)
    with build_opener(ProxyHandler({})).open(f"{found[1]}/api/studies", timeout=HANGS) as page:
        os.write(out.fileno(), page.read())
    os.kill(process, signal.SIGINT)


def written(stream: IO[bytes]) -> str:
    """All that was written into a file."""
    return os.pread(stream.fileno(), 1 << 24, 0).decode()


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    with quiet():  # which libraries read as they are imported
        pass
    exec(asked["before"], {})
    print(json.dumps([answer(step) for step in asked["steps"]]))
