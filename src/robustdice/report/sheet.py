"""The one kind of table that commands print. A figure in it is never cut or broken, however narrow the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

NARROWEST = 12
"""Columns that a folded text needs to be readable."""
_BORDER = 3
"""Columns between two cells."""


class Sheet:
    """A table whose first column names things and whose others are figures, except those in ``texts``.

    Texts are folded where the terminal is too narrow; where that is not enough, each row becomes a list of
    ``heading: value``. Nothing is read as markup.
    """

    def __init__(
        self, title: str, *headings: str, caption: str | None = None, texts: Iterable[str] = (), folds: bool = False
    ) -> None:
        """``folds``: the names in the first column may be folded too."""
        self.title, self.headings, self.caption = title, headings, caption
        self.rows: list[tuple[str, ...]] = []
        self._texts = {*texts, *(headings[:1] if folds else ())}

    def add_row(self, *cells: str) -> None:
        """One cell a column; those at the end may be left out."""
        self.rows.append((*cells, *[""] * (len(self.headings) - len(cells))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As wide as its content, if there is room."""
        yield Text(self.title, style="italic")
        columns = zip(self.headings, *self.rows, strict=True)
        widest = [max(map(cell_len, column)) for column in columns]
        least = [
            min(width, NARROWEST) if heading in self._texts else width
            for heading, width in zip(self.headings, widest, strict=True)
        ]
        if sum(least) + _BORDER * len(least) + 1 <= options.max_width:
            yield self._table()
        else:
            yield from self._list()
        if self.caption is not None:
            yield Text(self.caption, style="dim italic")

    def _table(self) -> Table:
        table = Table()
        for index, heading in enumerate(self.headings):
            text = heading in self._texts
            justify = "left" if text or index == 0 else "right"
            table.add_column(Text(heading), justify=justify, no_wrap=not text, overflow="fold")  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _list(self) -> Iterable[Text]:
        width = max(map(cell_len, self.headings))
        for name, *cells in self.rows:
            yield Text(f"{self.headings[0]} {name}".strip(), style="bold")
            for heading, cell in zip(self.headings[1:], cells, strict=True):
                if cell:
                    yield Text(f"  {heading.ljust(width)}  {cell}")
