"""Tables for notebooks and pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table in HTML. Cells are HTML, headings and caption text."""
    said = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    headings = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{said}<tr>{headings}</tr>{body}</table>"
