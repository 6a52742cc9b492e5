"""A console of rich that shows what strangers wrote, and commands as they are typed here."""

from typing import Any

from rich.console import Console
from rich.text import Text

from atp_tune.errors import printable
from atp_tune.extras import as_typed


class Terminal(Console):
    """A console that escapes control characters in names of studies and files."""

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, of text whose lines are made printable first."""
        return super().render_str(as_typed("\n".join(map(printable, text.split("\n")))), **options)
