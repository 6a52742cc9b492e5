"""The group of all commands, in which a first word that is no command is a model: `tune.py ORG/NAME --sparsity 0.5`."""

from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from atp_tune.spec.finding import known

MODEL = "MODEL"  # the command that such a word stands for, and its name in `--help`


class ModelGroup(TyperGroup):
    """The commands of `tune.py`; inserts the command `MODEL` before a model."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the options before the command, as the base class does."""
        return super().parse_args(ctx, self._with_command(args))

    def _with_command(self, args: list[str]) -> list[str]:
        ours, theirs = self.params, self.commands[MODEL].params
        options = {name: option for option in (*ours, *theirs) for name in option.opts if name.startswith("-")}
        names = [word.partition("=")[0] for word in args]
        if "--study" in names:
            return args
        position = 0
        while position < len(args) and args[position].startswith("-"):
            option: Any = options.get(names[position])
            takes_next = option is not None and not option.is_flag and "=" not in args[position]
            position += 1 + takes_next
        if position >= len(args):  # a study's options need no model
            only_theirs = {name for option in theirs for name in option.opts} - {
                name for option in ours for name in option.opts
            }
            return [MODEL, *args] if only_theirs & {*names} else args
        word = args[position]
        return [MODEL, word, *args[:position], *args[position + 1 :]] if self._is_model(word) else args

    def _is_model(self, word: str) -> bool:
        """Whether the command `MODEL` takes a word: a hub id, a file or a wheel; or a study, to say how it is run."""
        is_plain = word.isalpha() and not Path(word).is_dir() and word not in [path.stem for path in known()]
        return word not in self.commands and not is_plain


class ModelCommand(TyperCommand):
    """The command `MODEL`, whose name stands for its argument in the usage line."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage after the command's name."""
        return ["[OPTIONS]"]
