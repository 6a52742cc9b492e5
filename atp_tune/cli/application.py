"""The commands and their options, from what typer reads in the functions of `cli`."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from atp_tune.cli import apply, evaluate, studies, tune
from atp_tune.cli.options import UsageError, expanded, rejoin
from atp_tune.config.finding import known
from atp_tune.errors import UserError

MODEL = "MODEL"  # the command that such a word stands for, and its name in `--help`


class ModelGroup(TyperGroup):
    """The commands of `tune.py`; inserts the command `MODEL` before a model."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the options before the command, as the base class does."""
        ours, theirs = self.params, self.commands[MODEL].params
        options = {name: option for option in (*ours, *theirs) for name in option.opts if name.startswith("-")}
        names = [word.partition("=")[0] for word in args]
        position = 0
        while position < len(args) and args[position].startswith("-"):
            option: Any = options.get(names[position])
            takes_next = option is not None and not option.is_flag and "=" not in args[position]
            position += 1 + takes_next
        if "--study" not in names and position >= len(args):  # a study's options need no model
            of_study = {name for option in ours for name in option.opts}
            if ({name for option in theirs for name in option.opts} - of_study) & {*names}:
                args = [MODEL, *args]
        elif "--study" not in names:
            word = args[position]
            # A hub id, a file or a wheel; or a study, to say how it is run.
            is_plain = word.isalpha() and not Path(word).is_dir() and word not in known()
            if word not in self.commands and not is_plain:
                args = [MODEL, word, *args[:position], *args[position + 1 :]]
        return super().parse_args(ctx, args)


class ModelCommand(TyperCommand):
    """The command `MODEL`, whose name stands for its argument in the usage line."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage after the command's name."""
        return ["[OPTIONS]"]


app = typer.Typer(
    cls=ModelGroup, rich_markup_mode=None, pretty_exceptions_enable=False,
    subcommand_metavar="[MODEL | COMMAND] [ARGS]...",
)  # fmt: skip
app.callback(invoke_without_command=True)(expanded(tune.run))
app.command(MODEL, cls=ModelCommand)(expanded(tune.model))
for command in (  # in the order of `--help`
    studies.status, studies.plan, studies.serve, studies.merge, studies.export, studies.report, apply.apply, apply.pack,
    apply.unpack, apply.push, evaluate.evaluate, evaluate.generate, evaluate.chat, evaluate.classify, tune.prune,
    apply.finetune, evaluate.speedup, studies.studies, studies.plugins, studies.schema, studies.env,
):  # fmt: skip
    app.command()(expanded(command))


def run(words: list[str]) -> Any:
    """Runs the command line, and returns its exit code; UserError for wrong options."""
    rejoin(os.environ)
    name = Path(sys.argv[0]).name
    try:
        return app(words, prog_name="python -m atp_tune" if name == "__main__.py" else name, standalone_mode=False)
    except UsageError as error:
        # What is wrong, and the command whose help lists the options.
        command = error.ctx.command_path if error.ctx else "tune.py"
        message = " ".join(error.format_message().split()).replace("Value error, ", "")
        if message.startswith("No such command"):
            message = message.rstrip(".?") + ("?" if message.endswith("?") else ".")
            message += " A model is ORG/NAME, a folder, a .gguf file or pypi:NAME==VERSION."
        see = " See" if message.endswith("?") else "; see"
        raise UserError(f"{message.rstrip('.')}{see} {command} --help") from None
    except OSError as error:  # of whatever option: that of a path that is only read is not asked before
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{str(error.filename)[-60:]}: its name is too long") from None
