"""A preview as one HTML file that needs no other."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from megazh.files import write_atomic
from megazh.finetune.fit import Fitting
from megazh.finetune.preview import Kind, Preview, Run, Shown, facts, histogram

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.7 system-ui, "Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  max-width: 60em; margin: 2em auto; padding: 0 1em; }
h1, h2 { line-height: 1.3; } h2 { font-size: 1em; }
pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8886; border-radius: 6px;
  padding: .8em 1em; }
mark { background: #2a9d4a33; color: inherit; border-bottom: 2px solid #2a9d4a; }
.control { font-family: monospace; font-size: .85em; color: #0a6ebd; }
.lookalike { outline: 1px dashed #c60; }
th { text-align: left; padding-right: 2em; vertical-align: top; font-weight: 600; } td { padding-right: 1em; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { height: 1em; background: #2a9d4a; } .bars { width: 20em; }
.warning { color: #b30; }
"""


def write_html(path: Path, found: Preview, fitting: Fitting, title: str) -> None:
    """Write a preview as a page; all text of data is escaped, and the page may run no script.

    Args:
        path: the file.
        found: the preview.
        fitting: how its conversations were made.
        title: what was looked at.

    Raises:
        WriteError: it cannot be written; the old content stays.
    """
    write_atomic(path, "".join(f"{line}\n" for line in _page(found, fitting, title)).encode())


def _page(found: Preview, fitting: Fitting, title: str) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="zh">\n<head>\n<meta charset="utf-8">'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>"
    for line in found.warnings:
        yield f'<p class="warning">warning: {escape(line)}</p>'
    yield "<table>"
    for name, value in facts(found, fitting):
        yield f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
    for name, count in found.sets.items():
        yield f"<tr><th>set</th><td>{escape(f'{name}: {count.describe()}')}</td></tr>"
    yield "</table>"
    yield from _bars(found.lengths)
    yield "<p><mark>Trained tokens</mark>, "
    yield '<span class="control">control tokens</span>, <span class="lookalike">text that reads like one</span></p>'
    for number, shown in enumerate(found.shown, start=1):
        yield f"<h2>{number}. {escape(shown.describe())}</h2>"
        yield f"<pre>\n{_text(shown)}</pre>"  # the first line break within <pre> is not shown
    yield "</body>\n</html>"


def _bars(lengths: list[int]) -> Iterator[str]:
    bins = histogram(lengths)
    if not bins:
        return
    most = max(count for *_, count in bins)
    yield '<table>\n<tr><th>tokens</th><th>conversations</th><th class="bars"></th></tr>'
    for low, high, count in bins:
        yield (
            f'<tr><td class="number">{low:,} to {high:,}</td><td class="number">{count:,}</td>'
            f'<td><div class="bar" style="width:{100 * count / most:.1f}%"></div></td></tr>'
        )
    yield "</table>"


def _text(shown: Shown) -> str:
    return "".join(_span(run) for run in shown.runs)


def _span(run: Run) -> str:
    text = escape(run.text)
    if run.kind is not Kind.TEXT:
        text = f'<span class="{run.kind}">{text}</span>'
    return f"<mark>{text}</mark>" if run.trained else text
