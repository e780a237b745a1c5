"""Demo instructions: questions about the world of the stories, each with its one right answer, from a seed."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from megazh.demo.words import COLOURS, FOREST, FRUITS, THINGS, Teller, hanzi
from megazh.files import write_atomic

Row = dict[str, object]
"""A row in the alpaca form: `instruction`, `output`, and where it goes on `history`, pairs of question and answer."""


def question(seed: int, number: int) -> Row:
    """Question `number` with this seed, and its answer; a pure function of its arguments."""
    teller = Teller(random.Random(f"question/{seed}/{number}"))
    return teller.one(list((FACTS if teller.chance(_FACTS) else TOLD).values()))(teller)


def write_questions(path: Path, count: int, seed: int) -> None:
    """Write questions 0 to `count` - 1 to `path` as JSON Lines. The same arguments give the same bytes; atomic."""
    lines = (json.dumps(question(seed, number), ensure_ascii=False) for number in range(count))
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())


def _row(instruction: str, output: str, *history: tuple[str, str]) -> Row:
    row: Row = {"instruction": instruction, "output": output}
    return {**row, "history": [list(turn) for turn in history]} if history else row


def _colour(t: Teller) -> Row:
    """Two children with a thing each: the colour of one, then perhaps of the other."""
    a, b = t.children(2)
    (first, _), (second, _) = t.some(THINGS, 2)
    one, other = t.some(COLOURS, 2)
    told = f"{a.full}的{first}是{one}的，{b.full}的{second}是{other}的。"
    asked = [(f"{a.name}的{first}是什么颜色？", f"{one}。"), (f"{b.name}的{second}是什么颜色？", f"{other}。")]
    order = t.some(asked, 2)
    if t.chance(0.3):
        return _row(*order[1], (told + order[0][0], order[0][1]))
    return _row(told + order[0][0], order[0][1])


def _owner(t: Teller) -> Row:
    """Two children with a thing each: who has one of them."""
    a, b = t.children(2)
    (first, one), (second, other) = t.some(THINGS, 2)
    told = f"{a.full}有一{one}{first}，{b.full}有一{other}{second}。"
    thing, owner = t.one([(first, a), (second, b)])
    return _row(f"{told}{t.one(['谁有', '请问谁有'])}{thing}？", f"{owner.name}有{thing}。")


def _route(t: Teller) -> Row:
    """Three places one after the other: the first or the last of them."""
    (child,) = t.children(1)
    places = [haunt.place for haunt in t.some(t.world.haunts, 3)]
    told = f"{child.full}先去{places[0]}，后来去{places[1]}，最后去{places[2]}。"
    which = t.one([0, 2])
    return _row(f"{told}{child.name}{'先' if which == 0 else '最后'}去了哪里？", f"{places[which]}。")


def _sum(t: Teller) -> Row:
    """Two children pick fruit: how many there are together."""
    a, b = t.children(2)
    fruit, _ = t.one(FRUITS)
    x, y = t.between(1, 9), t.between(1, 9)
    told = f"{a.full}摘了{t.count(x, '个')}{fruit}，{b.full}摘了{t.count(y, '个')}。"
    return _row(f"{told}一共有多少个{fruit}？", f"一共有{t.count(x + y, '个')}。")


def _more(t: Teller) -> Row:
    """Two children pick fruit: who has more."""
    a, b = t.children(2)
    fruit, _ = t.one(FRUITS)
    x, y = t.some(range(1, 20), 2)
    told = f"{a.full}摘了{t.count(x, '个')}{fruit}，{b.full}摘了{t.count(y, '个')}。"
    return _row(f"{told}谁摘得多？", f"{(a if x > y else b).name}摘得多。")


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
    """Two children at two places: where one of them is."""
    a, b = t.children(2)
    here, there = t.some(t.world.haunts, 2)
    told = f"{a.full}在{here.place}{here.doing}，{b.full}在{there.place}{there.doing}。"
    child, haunt = t.one([(a, here), (b, there)])
    if t.chance():
        return _row(f"{told}{child.name}在哪里？", f"{child.name}在{haunt.place}。")
    return _row(f"{told}{child.name}在做什么？", f"{child.name}在{haunt.doing}。")


TOLD: dict[str, Callable[[Teller], Row]] = {
    "colour": _colour,
    "owner": _owner,
    "route": _route,
    "place": _place,
    "sum": _sum,
    "more": _more,
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
