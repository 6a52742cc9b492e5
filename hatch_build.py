"""Compiles atp_tune/packed/kernel.c when a wheel is built: with $CC, else cc, else the compiler of the package ziglang.

    python hatch_build.py    compiles it beside its source, as an editable install does; needs hatchling

One file is compiled without options for a CPU: it holds the code for all of them, and chooses when it is loaded. If
that fails, a warning says so and the wheel has no library; the package then multiplies by torch's own operations.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

SOURCE, LIBRARY = "atp_tune/packed/kernel.c", "atp_tune/packed/_kernel.so"
# GCC would gather scalars of several rows into vectors, which takes twice the time.
OPTIONS = ("-std=c11", "-O3", "-fno-tree-slp-vectorize", "-ffp-contract=off", "-fPIC", "-shared", "-g0")
STRIPPED = ("-s",) if sys.platform == "linux" else ()
ZIG = "ziglang>=0.13"
OLDEST_GLIBC = (2, 17)


class CustomBuildHook(BuildHookInterface[Any]):
    """What hatchling calls."""

    def dependencies(self) -> list[str]:
        """A compiler from PyPI where the machine has none."""
        return [] if own_compiler() else [ZIG]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Puts the library into the wheel, whose tag then names the platform; or beside the source."""
        root = Path(self.root)
        if version == "editable":
            compiled(root / SOURCE, root / LIBRARY)
            return
        folder = Path(tempfile.mkdtemp(prefix="atp-tune-"))
        self.folder = folder
        library = folder / Path(LIBRARY).name
        if compiled(root / SOURCE, library):
            build_data["force_include"][str(library)] = LIBRARY
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_of(library)}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes what `initialize` made outside the tree."""
        if version != "editable":
            shutil.rmtree(self.folder, ignore_errors=True)


def own_compiler() -> list[str]:
    """The command of the machine's C compiler; empty if there is none."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    return command if shutil.which(command[0]) else []


def compiler() -> list[str]:
    """The command to use, with options that keep zig from code for this very machine; empty if there is none."""
    if command := own_compiler():
        return command
    if importlib.util.find_spec("ziglang") is None:
        return []
    command = [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]
    if sys.platform == "linux" and not next(platform_tags()).startswith("musl"):
        glibc = ".".join(map(str, OLDEST_GLIBC))
        command += ["-target", f"{os.uname().machine}-linux-gnu.{glibc}"]
    return command


def compiled(source: Path, library: Path) -> bool:
    """Whether the library could be made; if not, a line says why."""
    made = library.with_suffix(f".{os.getpid()}")  # whole at once: another installation may run beside this one
    command = [*compiler(), *OPTIONS, *STRIPPED, "-o", str(made), str(source)]
    if command[0] == OPTIONS[0]:
        error = "no C compiler: set CC, or pip install ziglang"
    else:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            error = f"{done.stderr.strip() or done.returncode}" if done.returncode else ""
            if not error:
                made.replace(library)
        except OSError as caught:
            error = str(caught)
    if error:
        first = next((line for line in error.splitlines() if "error" in line), error.splitlines()[0])
        print(f"warning: without the compiled kernel for packed weights: {first}", file=sys.stderr)
    return not error


def platform_of(library: Path) -> str:
    """The platform in a wheel's tag: by the newest symbols of glibc in the library; elsewhere this machine's."""
    needed = [(int(major), int(minor)) for major, minor in re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())]
    if sys.platform != "linux" or not needed:
        return next(platform_tags())
    major, minor = max(*needed, OLDEST_GLIBC)
    return f"manylinux_{major}_{minor}_{os.uname().machine}"


if __name__ == "__main__":
    here = Path(__file__).parent
    sys.exit(0 if compiled(here / SOURCE, here / LIBRARY) else 1)
