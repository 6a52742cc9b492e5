"""What a caller gives from memory, a model with its tokenizer and texts, and how studies come to it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp_tune.errors import UserError

ROLES = ("calibration", "validation", "test")


@dataclass(frozen=True)
class Sources:
    """How a study file names what is lent; None for what is not."""

    model: str | None = None
    device: str | None = None
    texts: str | Mapping[str, str] | None = None


@dataclass(frozen=True)
class Lender:
    """A model in memory with its tokenizer, if there is one, and documents: of one text, or by role."""

    model: Any = None
    tokenizer: Any = None
    texts: str | Mapping[str, str | list[str]] | list[str] | None = None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, texts: Any) -> "Lender":
        """What of these arguments lies in memory; UserError for texts of another type."""
        return cls(model, tokenizer, texts_of(texts))

    @contextmanager
    def lend(self) -> Iterator[Sources]:
        """Lends model and texts; they are found by the sources that it yields until the end."""
        with ExitStack() as stack:
            model, device = None, None
            if self.model is not None:
                from atp_tune.checkpoints.checkpoint import lent

                model = stack.enter_context(lent(self.model, self.tokenizer)).id
                device = _device_of(self.model)
            yield Sources(model, device, self._lend_texts(stack))

    def _lend_texts(self, stack: ExitStack) -> str | Mapping[str, str] | None:
        from atp_tune.inputs.local import lent

        def named(texts: str | list[str]) -> str:
            return texts if isinstance(texts, str) else stack.enter_context(lent(texts))

        if self.texts is None:
            return None
        if isinstance(self.texts, str | list):
            return named(self.texts)
        return {role: named(texts) for role, texts in self.texts.items()}


def texts_of(texts: Any) -> str | Mapping[str, str | list[str]] | list[str] | None:
    """A name or path of texts, documents, or either by role, from what a caller gives; UserError for anything else."""
    from atp_tune.inputs.local import documents_of

    def one(value: Any, what: str) -> str | list[str]:
        if isinstance(value, str) and any(space in value.strip() for space in "\n ") and not Path(value).is_file():
            raise UserError(f"{what}: is neither a file nor a name of texts; give documents as a list, as in [text]")
        return str(value) if isinstance(value, str | Path) else documents_of(value, what)

    if texts is None or not isinstance(texts, Mapping):
        return None if texts is None else one(texts, "texts")
    if {*texts} != {*ROLES}:
        raise UserError(
            "texts: give calibration, validation and test, or one list, of which three parts are used; "
            f"got {', '.join(map(str, texts)) or 'none'}"
        )
    return {role: one(value, f'texts["{role}"]') for role, value in texts.items()}


def _device_of(model: Any) -> str:
    """The device of a model's weights, as in a study file."""
    device = next(model.parameters()).device
    return str(device) if device.type == "cuda" else str(device.type)


def is_model(value: Any) -> bool:
    """Whether an argument is a model in memory, even one that is not treated, and no name of one."""
    return not isinstance(value, str | Path) and hasattr(value, "parameters")


def names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())
