"""What a test starts ends with it."""

import signal
import subprocess
import sys

from processes import at_end, catches, popen, scope
from tinystudy import wait_until


def test_what_a_failing_test_leaves_is_ended() -> None:
    said: list[str] = []
    try:
        with scope():
            process = popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            at_end(said.append, "end")
            raise AssertionError
    except AssertionError:
        pass
    assert (process.returncode, process.stdin.closed, process.stdout.closed) == (-signal.SIGKILL, True, True)
    assert said == ["end"]


def test_who_catches_a_signal() -> None:
    code = "import signal; input(); signal.signal(signal.SIGINT, signal.SIG_DFL); print(flush=True); input()"
    process = popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: catches(process, signal.SIGINT))  # Python's own, which raises KeyboardInterrupt
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    assert not catches(process, signal.SIGINT)
    process.communicate("\n")
    assert not catches(process, signal.SIGINT)
