"""The command line, the only package that prints. Commands import heavy libraries when they run."""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import typer

from atp_tune.cli import completion
from atp_tune.cli.commands import (
    apply,
    chat,
    env,
    evaluate,
    export,
    finetune,
    generate,
    init,
    merge,
    model,
    plan,
    plugins,
    prune,
    push,
    report,
    schema,
    serve,
    speedup,
    status,
    studies,
    tune,
)
from atp_tune.cli.model_group import MODEL, ModelCommand, ModelGroup
from atp_tune.cli.options import UsageError
from atp_tune.errors import TrialError, UserError, printable

SPINS = "10000"  # spins of libgomp before a waiting thread sleeps, instead of millions; no slower on idle cores

app = typer.Typer(
    cls=ModelGroup, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    subcommand_metavar="[MODEL | COMMAND] [ARGS]...",
)  # fmt: skip
app.callback(invoke_without_command=True)(tune.run)
app.command(MODEL, cls=ModelCommand)(model.model)
for command in (  # in the order of `--help`
    init.init, status.status, plan.plan, serve.serve, merge.merge, export.export, report.report, apply.apply, push.push,
    evaluate.evaluate, generate.generate, chat.chat, prune.prune, finetune.finetune, speedup.speedup, studies.studies,
    plugins.plugins, schema.schema, env.env,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Runs the command line; bad input ends in one line on stderr and exit code 2."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C code would log to stderr what we report in one line
    if "OMP_WAIT_POLICY" not in os.environ:  # torch's threads spin while they wait for each other, which makes
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # trials several times slower if other jobs use the cores
    completion.rejoin(os.environ)
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name=Path(sys.argv[0]).name, standalone_mode=False))
    except UsageError as error:
        _end(_usage(error))
    except (UserError, TrialError) as error:
        _end(str(error))
    except OSError as error:
        if "--install-completion" not in sys.argv:
            raise
        _end(f"--install-completion: {error.filename}: {error.strerror}; see --show-completion")


def _end(message: str) -> NoReturn:
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


def _usage(error: Any) -> str:
    """The message for wrong options: what is wrong, and the command whose help lists the options."""
    command = error.ctx.command_path if error.ctx else "tune.py"
    message = " ".join(error.format_message().split()).replace("Value error, ", "")
    if message.startswith("No such command"):
        message = message.rstrip(".?") + ("?" if message.endswith("?") else "")
        message += " A model is ORG/NAME, a folder, a .gguf file or pypi:NAME==VERSION."
    see = " See" if message.endswith("?") else "; see"
    return f"{message.rstrip('.')}{see} {command} --help"
