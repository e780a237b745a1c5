"""A preview as lines: colours on a terminal, brackets elsewhere."""

from collections.abc import Iterator

from megazh.finetune.fit import Fitting
from megazh.finetune.preview import Kind, Preview, Run, Shown, facts, histogram, visible

# In the order of preference; the last ones are for outputs without the others.
_BRACKETS = ["⟦⟧", "⟪⟫", "⟬⟭", "⦃⦄", "⦅⦆", "⦉⦊", "[[]]", "{{}}", "<<>>", "[%%]"]
_RESET = "\033[0m"
_BAR = 50  # columns
_HEAD, _TAIL = 240, 120  # characters of a run that are shown


def text_lines(found: Preview, fitting: Fitting, colour: bool, encoding: str = "utf-8") -> Iterator[str]:
    """Lines of a preview. Long texts are shortened.

    Args:
        found: the preview.
        fitting: how its conversations were made.
        colour: whether to write ANSI colours instead of brackets.
        encoding: encoding of the output, which decides about brackets.
    """
    texts = [run.text for shown in found.shown for run in shown.runs]
    trained, lookalike = choose_brackets(texts, encoding)
    any_like = any(run.kind is Kind.LOOKALIKE for shown in found.shown for run in shown.runs)
    if colour:
        yield (
            f"{_style(True, Kind.TEXT)}trained tokens{_RESET}, {_style(False, Kind.CONTROL)}control tokens{_RESET}"
            + (f", {_style(False, Kind.LOOKALIKE)}text that reads like a control token{_RESET}" if any_like else "")
        )
    else:
        yield f"{''.join(trained)} stand around trained tokens" + (
            f", {''.join(lookalike)} around text that reads like a control token" if any_like else ""
        )
    for number, shown in enumerate(found.shown, start=1):
        yield ""
        yield f"--- {number}. {shown.describe()}"
        yield from (_coloured(shown) if colour else _bracketed(shown, trained, lookalike))
    yield ""
    for name, value in facts(found, fitting):
        yield f"{name:<15}{value}"
    yield from _bars(found.lengths)
    for name, count in found.sets.items():
        yield f"{'set':<15}{visible(f'{name}: {count.describe()}')}"
    for line in found.warnings:
        yield f"warning: {line}"


def choose_brackets(texts: list[str], encoding: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two pairs of brackets that the texts lack and that an output can show; where there are none, the rarest ones."""

    def count(pair: str) -> tuple[bool, int]:
        shows = pair.encode(encoding, "replace").decode(encoding) == pair
        return not shows, sum(text.count(half) for text in texts for half in _halves(pair))

    first, second = sorted(_BRACKETS, key=count)[:2]
    return _halves(first), _halves(second)


def _halves(pair: str) -> tuple[str, str]:
    middle = len(pair) // 2
    return pair[:middle], pair[middle:]


def _bracketed(shown: Shown, trained: tuple[str, str], lookalike: tuple[str, str]) -> Iterator[str]:
    text, inside = "", False
    for run in shown.runs:
        if run.trained != inside:
            text, inside = text + trained[not run.trained], run.trained
        piece = _shortened(run.text)
        text += f"{lookalike[0]}{piece}{lookalike[1]}" if run.kind is Kind.LOOKALIKE else piece
    yield from (text + (trained[1] if inside else "")).removesuffix("\n").split("\n")


def _coloured(shown: Shown) -> Iterator[str]:
    text = "".join(_painted(run) for run in shown.runs)
    yield from text.removesuffix("\n").split("\n")


def _painted(run: Run) -> str:
    """A run with its colour; each line by itself, so that no colour goes on behind the end of a line."""
    style = _style(run.trained, run.kind)
    lines = _shortened(run.text).split("\n")
    return "\n".join(f"{style}{line}{_RESET}" if line and style else line for line in lines)


def _style(trained: bool, kind: Kind) -> str:
    if kind is Kind.LOOKALIKE:
        return "\033[7m"
    if trained:
        return "\033[1;32m"
    return "\033[36m" if kind is Kind.CONTROL else ""


def _shortened(text: str) -> str:
    left = len(text) - _HEAD - _TAIL
    return text if left < _HEAD else f"{text[:_HEAD]} […{left:,} characters…] {text[-_TAIL:]}"


def _bars(lengths: list[int]) -> Iterator[str]:
    bins = histogram(lengths)
    most = max((count for *_, count in bins), default=0)
    for low, high, count in bins:
        bar = "#" * -(-_BAR * count // most)
        yield f"{low:>9,} to {high:>9,} {count:>11,} {bar}".rstrip()
