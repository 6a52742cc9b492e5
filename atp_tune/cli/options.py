"""Options of several commands, and functions that find the study that they name."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atp_tune.cli import completion

UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that typer brings along

if TYPE_CHECKING:
    from atp_tune.spec.studyfile import StudyFile

STUDY: Any = typer.Option(
    "--study",
    metavar="NAME",
    help="Name of a study in `studies/`, or path of a .toml file.",
    autocompletion=completion.study_names,
)
StudyName = Annotated[str, STUDY]
StudyLabel = Annotated[
    str | None,
    typer.Option("--study-name", metavar="NAME", help="Name of the study in the storage; default: the study file's."),
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Optuna storage URL; default: NAME.db beside the study file."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the study file (see atp_tune/spec/study.py): `--set texts.validation.nsamples=8`.",
        autocompletion=completion.overrides,
    ),
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON document and nothing else.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", metavar="", help="Read .bin weights, which are pickles and may run code.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", metavar="", help="Run the Python code that the model's folder holds.")
]
TrustPlugins = Annotated[
    bool,
    typer.Option(
        "--trust-plugins",
        metavar="",
        help="Run the Python code that the study names: plug-ins, packages of texts, functions of tasks.",
    ),
]
Private = Annotated[
    bool, typer.Option("--private", metavar="", help="Make the repository private, if it does not exist yet.")
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="A prompt to continue, in a study beside three fixed ones; may be given several times.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="auto, cpu, mps, cuda or cuda:N.", autocompletion=completion.devices),
]


class Format(StrEnum):
    """Number formats of the weights of a folder."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DType = Annotated[
    Format | None,
    typer.Option(
        "--dtype", metavar="DTYPE",
        help="float32, bfloat16 or float16 for the folder; default: as the dense model's files, of .gguf as computed.",
    ),
]  # fmt: skip


class PoolEngine(StrEnum):
    """What runs the workers of a study."""

    process = "process"
    ray = "ray"


Trials = Annotated[int | None, typer.Option(min=1, help="Number of trials of the study, over all runs.")]
Timeout = Annotated[
    float | None, typer.Option(min=0, metavar="SECONDS", help="Start no new trial after so many seconds.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker processes; each gets a CUDA device, or a share of the CPU cores.")
]
Devices = Annotated[
    str | None, typer.Option(metavar="LIST", help="One worker process for each device, as in `cuda:0,cuda:1`.")
]
AllowDeviceChange = Annotated[
    bool,
    typer.Option(
        "--allow-device-change", metavar="", help="Resume a study that began on another device or in another dtype."
    ),
]
Engine = Annotated[
    PoolEngine,
    typer.Option(metavar="ENGINE", help="process: workers run on this machine; ray: on a cluster, one per GPU."),
]
RayAddress = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Address of the Ray cluster; default: this machine's.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Print the study's cost, as `plan` does; run nothing.")
]


class TrackerName(StrEnum):
    """Where else trials are written to."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"


Track = Annotated[
    list[TrackerName] | None,
    typer.Option(metavar="TRACKER", help="Also write trials to tensorboard, mlflow or wandb; may be repeated."),
]


def load_study(
    study: str,
    storage: str | None,
    device: str | None,
    set_: list[str] | None,
    plugins: bool | None = None,
    folder: Path | None = None,
) -> "StudyFile":
    """A study file by name or path, with options as overrides; UserError for what is wrong in it.

    `plugins`: None where no code of plug-ins is needed, else whether it may run; `folder`: where their places start.
    """
    from atp_tune.spec.studyfile import absolute_storage, load

    place = absolute_storage(storage, Path()) if storage else None
    options: dict[str, Any] = {"storage": place, "device": device}
    named = [f"{key}={value}" for key, value in options.items() if value is not None]
    return load(study, [*(set_ or []), *named], plugins, folder)


def permissions(allow_pickle: bool, trust_remote_code: bool, trust_plugins: bool) -> dict[str, bool]:
    """What a configuration, which may be a stranger's, cannot allow."""
    return {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code, "trust_plugins": trust_plugins}


def checked_prompts(prompts: list[str] | None) -> tuple[str, ...]:
    """The prompts of the option; BadParameter for an empty one, or one that is not UTF-8 text."""
    from atp_tune.errors import is_text

    for prompt in prompts or ():
        if not prompt.strip() or not is_text(prompt):
            raise typer.BadParameter("must be a text, and not empty", param_hint="--prompt")
    return tuple(prompts or ())


def stored_study(file: "StudyFile", study_name: str | None) -> Any:
    """The Optuna study of a study file; UserError if it has no trials yet."""
    from atp_tune.results import stored

    return stored.stored_study(file, study_name)
