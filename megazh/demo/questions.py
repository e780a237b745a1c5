"""Demo instructions: questions about the world of the stories, each with its one right answer, from a seed."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NotRequired, TypedDict

from megazh.demo.words import COLOURS, FOREST, FRUITS, THINGS, Teller, hanzi
from megazh.files import write_atomic


class Row(TypedDict):
    """A row in the alpaca form."""

    instruction: str
    output: str
    history: NotRequired[list[list[str]]]
    """Pairs of earlier question and answer."""


def question(seed: int, number: int) -> Row:
    """Question `number` with this seed, and its answer; a pure function of its arguments."""
    return _any(Teller(random.Random(f"question/{seed}/{number}")))


def long_question(seed: int, number: int, length: int) -> Row:
    """A conversation of many questions; in one half of the cases, the last one asks for what only the first one tells.

    A pure function of its arguments.

    Args:
        seed: seed of the random draws.
        number: number of the conversation with this seed.
        length: number of characters of the conversation, within about 60.
    """
    teller = Teller(random.Random(f"long question/{seed}/{number}"))
    a, b = teller.children(2)
    (first, _), (second, _) = teller.some(THINGS, 2)
    one, other = teller.some(COLOURS, 2)
    told = f"{a.full}的{first}是{one}的，{b.full}的{second}是{other}的。"
    (asked, answer), last = teller.some(
        [(f"{a.name}的{first}是什么颜色？", f"{one}。"), (f"{b.name}的{second}是什么颜色？", f"{other}。")], 2
    )
    history = [(told + asked, answer)]
    while sum(len(text) for turn in history for text in turn) < length:
        between = _any(teller)
        turns = [(asked, answer) for asked, answer in between.get("history", [])]
        turns.append((between["instruction"], between["output"]))
        if not any(child.name in text for turn in turns for text in turn for child in (a, b)):
            history += turns
    if teller.chance():
        return _row(*last, *history)
    *others, last = turns
    return _row(*last, *history[: -len(turns)], *others)


def write_questions(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to `path` as JSON Lines. The same rows give the same bytes; atomic."""
    write_atomic(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())


def _any(t: Teller) -> Row:
    return t.one(list((FACTS if t.chance(_FACTS) else TOLD).values()))(t)


def _row(instruction: str, output: str, *history: tuple[str, str]) -> Row:
    row: Row = {"instruction": instruction, "output": output}
    if history:
        row["history"] = [list(turn) for turn in history]
    return row


def _about(t: Teller, told: str, one: tuple[str, str], other: tuple[str, str]) -> Row:
    """One of two questions about what is told, or both of them."""
    first, second = t.some([one, other], 2)
    if t.chance(_BOTH):
        return _row(*second, (told + first[0], first[1]))
    return _row(told + first[0], first[1])


def _colour(t: Teller) -> Row:
    """Two children with a thing each: its colour."""
    a, b = t.children(2)
    (first, _), (second, _) = t.some(THINGS, 2)
    one, other = t.some(COLOURS, 2)
    return _about(
        t,
        f"{a.full}的{first}是{one}的，{b.full}的{second}是{other}的。",
        (f"{a.name}的{first}是什么颜色？", f"{one}。"),
        (f"{b.name}的{second}是什么颜色？", f"{other}。"),
    )


def _owner(t: Teller) -> Row:
    """Two children with a thing each: who has one of them."""
    a, b = t.children(2)
    (first, one), (second, other) = t.some(THINGS, 2)
    who = t.one(["谁有", "请问谁有"])
    return _about(
        t,
        f"{a.full}有一{one}{first}，{b.full}有一{other}{second}。",
        (f"{who}{first}？", f"{a.name}有{first}。"),
        (f"{who}{second}？", f"{b.name}有{second}。"),
    )


def _route(t: Teller) -> Row:
    """Three places one after the other: the first or the last of them."""
    (child,) = t.children(1)
    first, second, last = (haunt.place for haunt in t.some(t.world.haunts, 3))
    return _about(
        t,
        f"{child.full}先去{first}，后来去{second}，最后去{last}。",
        (f"{child.name}先去了哪里？", f"{first}。"),
        (f"{child.name}最后去了哪里？", f"{last}。"),
    )


def _picked(t: Teller) -> Row:
    """Two children pick fruit: how many there are together, or who has more."""
    a, b = t.children(2)
    fruit, _ = t.one(FRUITS)
    x, y = t.some(range(1, 10), 2)
    return _about(
        t,
        f"{a.full}摘了{t.count(x, '个')}{fruit}，{b.full}摘了{t.count(y, '个')}。",
        (f"一共有多少个{fruit}？", f"一共有{t.count(x + y, '个')}。"),
        ("谁摘得多？", f"{(a if x > y else b).name}摘得多。"),
    )


def _species(t: Teller) -> Row:
    """An animal of the forest: what it is called, or what it is."""
    being = t.one([each for each in FOREST.children if each.name != each.full])
    species = being.full.removesuffix(being.name)
    return _row(*t.one([(f"{species}叫什么名字？", f"{being.name}。"), (f"{being.name}是什么动物？", f"{species}。")]))


def _season(t: Teller) -> Row:
    """A fruit: the season in which it is ripe."""
    fruit, season = t.one(FRUITS)
    return _row(t.one([f"{fruit}什么季节成熟？", f"{fruit}在哪个季节成熟？"]), f"{fruit}在{season}成熟。")


def _measure(t: Teller) -> Row:
    """A thing: its measure word."""
    thing, measure = t.one(THINGS)
    return _row(f"“{thing}”用什么量词？", f"一{measure}{thing}。")


def _numeral(t: Teller) -> Row:
    """A number: in Chinese numerals, or in digits."""
    number = t.between(0, 99)
    return _row(
        *t.one(
            [
                (f"{number}用汉字怎么写？", f"{hanzi(number)}。"),
                (f"{hanzi(number)}用数字怎么写？", f"{number}。"),
            ]
        )
    )


def _place(t: Teller) -> Row:
    """Two children at two places: where one of them is, and what it does."""
    a, b = t.children(2)
    here, there = t.some(t.world.haunts, 2)
    places, doings = (
        [(f"{child.name}{ask}", f"{child.name}在{answer}。") for child, answer in zip((a, b), answers, strict=True)]
        for ask, answers in (("在哪里？", (here.place, there.place)), ("在做什么？", (here.doing, there.doing)))
    )
    told = f"{a.full}在{here.place}{here.doing}，{b.full}在{there.place}{there.doing}。"
    return _about(t, told, t.one(places), t.one(doings))


TOLD: dict[str, Callable[[Teller], Row]] = {
    "colour": _colour,
    "owner": _owner,
    "route": _route,
    "place": _place,
    "picked": _picked,
}
"""Questions about what they tell themselves, by name; several million are possible."""
FACTS: dict[str, Callable[[Teller], Row]] = {
    "species": _species,
    "season": _season,
    "measure": _measure,
    "numeral": _numeral,
}
"""Questions about facts of the world, by name; about 250 are possible."""
_FACTS = 0.2  # probability of a question about a fact
_BOTH = 0.7  # probability that two questions about the same are asked
