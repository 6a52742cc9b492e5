"""The commands and their options, from what typer reads in the functions of `cli/commands`."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import typer

from atp_tune.cli import completion
from atp_tune.cli.commands import (
    apply,
    chat,
    classify,
    env,
    evaluate,
    export,
    finetune,
    generate,
    merge,
    model,
    pack,
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
from atp_tune.cli.options import UsageError, expanded
from atp_tune.errors import UserError
from atp_tune.extras import as_typed

app = typer.Typer(
    cls=ModelGroup, rich_markup_mode=None, pretty_exceptions_enable=False,
    subcommand_metavar="[MODEL | COMMAND] [ARGS]...",
)  # fmt: skip
app.callback(invoke_without_command=True, help=as_typed(str(tune.run.__doc__)))(expanded(tune.run))
app.command(MODEL, cls=ModelCommand, help=as_typed(str(model.model.__doc__)))(expanded(model.model))
for command in (  # in the order of `--help`
    status.status, plan.plan, serve.serve, merge.merge, export.export, report.report, apply.apply, pack.pack,
    pack.unpack, push.push, evaluate.evaluate, generate.generate, chat.chat, classify.classify, prune.prune,
    finetune.finetune, speedup.speedup, studies.studies, plugins.plugins, schema.schema, env.env,
):  # fmt: skip
    app.command(help=as_typed(str(command.__doc__)))(expanded(command))


def run(words: list[str]) -> Any:
    """Runs the command line, and returns its exit code; UserError for wrong options."""
    completion.rejoin(os.environ)
    name = Path(sys.argv[0]).name
    try:
        return app(words, prog_name="python -m atp_tune" if name == "__main__.py" else name, standalone_mode=False)
    except UsageError as error:
        raise UserError(_usage(error)) from None
    except OSError as error:  # of whatever option: that of a path that is only read is not asked before
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{str(error.filename)[-60:]}: its name is too long") from None


def _usage(error: Any) -> str:
    """The message for wrong options: what is wrong, and the command whose help lists the options."""
    command = error.ctx.command_path if error.ctx else "tune.py"
    message = " ".join(error.format_message().split()).replace("Value error, ", "")
    if message.startswith("No such command"):
        message = message.rstrip(".?") + ("?" if message.endswith("?") else ".")
        message += " A model is ORG/NAME, a folder, a .gguf file or pypi:NAME==VERSION."
    see = " See" if message.endswith("?") else "; see"
    return f"{message.rstrip('.')}{see} {command} --help"
