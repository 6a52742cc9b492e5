"""How this package is installed: what a person types to run it, and to install what is missing.

Some packages are needed by some commands only, and are extras of pyproject.toml. This module imports no package, so
that it works where none is installed.
"""

import re
import shlex
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from atp_tune.errors import UserError

EXTRAS = {  # of pyproject.toml: for each module its package
    "images": {"PIL": "pillow"},
    "postgres": {"psycopg": "psycopg"},
    "png": {"kaleido": "kaleido"},
    "eval": {"lm_eval": "lm-eval"},
    "fuzz": {"atheris": "atheris"},
    "ray": {"ray": "ray"},
    "finetune": {"peft": "peft"},
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
        for other, package in modules.items():
            if name == other.partition(".")[0]:
                return f"{package} is not installed; run: {install(extra)}"
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
