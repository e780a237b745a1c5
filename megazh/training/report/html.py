"""Pieces of HTML; all text that is put into them is escaped."""

import datetime
from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already."""


def html(text: object) -> Html:
    """Escape text; HTML stays as it is."""
    return text if isinstance(text, Html) else Html(escape(str(text)))


def element(name: str, *content: object, **attributes: str) -> Html:
    """An element; the attribute `class_` is `class`."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{''.join(html(each) for each in content)}</{name}>")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: str = "") -> Html:
    """A table that scrolls sideways where the page is narrow.

    Args:
        head: names of the columns; empty for none.
        rows: cells, row by row.
        numbers: a letter for each column: `n` aligns it to the right, as numbers are.
    """
    aligned = [{"class_": "number"} if letter == "n" else {} for letter in numbers.ljust(50)]
    lines = ["<table>"]
    if head:
        cells = [element("th", name, scope="col", **kind) for name, kind in zip(head, aligned, strict=False)]
        lines.append(f"<thead><tr>{''.join(cells)}</tr></thead>")
    lines.append("<tbody>")
    for row in rows:
        cells = [element("td", cell, **kind) for cell, kind in zip(row, aligned, strict=False)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody></table>")
    return element("div", Html("\n".join(lines)), class_="wide")


def facts(rows: Iterable[tuple[str, object]]) -> Html:
    """A list of names and values."""
    return element("dl", *(Html(element("dt", name) + element("dd", value)) for name, value in rows))


def code(text: object) -> Html:
    """Text in letters of equal width."""
    return element("code", text)


def folded(summary: str, content: Html) -> Html:
    """Content that is shown on a click, without a script."""
    return element("details", element("summary", summary), content)


def time_text(seconds: float | None) -> str:
    """A time in UTC; empty where it is not known."""
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
