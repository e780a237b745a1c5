"""Text that says nothing, to hide a passkey in: made-up sentences, or those of a file."""

import random
import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path

from megazh.errors import DataError, UsageError


class Language(StrEnum):
    """Languages of the questions and of made-up sentences."""

    CHINESE = "zh"
    ENGLISH = "en"

    @property
    def joint(self) -> str:
        """What stands between two sentences."""
        return " " if self is Language.ENGLISH else ""


Filler = Callable[[Language, random.Random], Iterator[str]]
"""Makes an endless series of sentences in a language."""

_PARTS: dict[Language, tuple[str, ...]] = {
    Language.CHINESE: (
        "早晨 中午 傍晚 夜里 春天 秋天 下雨的时候 天晴以后 集市散了以后 放学的路上 吃过晚饭 很久以前",
        "老人 邻居 画家 船夫 木匠 老师 农夫 裁缝 渔夫 牧童 客人 小姑娘",
        "在河边 在院子里 在山脚下 在桥上 在窗前 在田野里 在老街上 在树荫下 在码头旁 在屋檐下 在茶馆里 在菜园里",
        "看云慢慢飘过 修一只旧木箱 数着路过的行人 晒一筐豆子 听别人讲故事 慢慢地喝茶 给花浇水 补一张渔网 和朋友下棋 "
        "写一封长信 捡起一片落叶 轻轻地唱着歌",
    ),
    Language.ENGLISH: (
        "In the morning|At noon|In the evening|Late at night|In spring|In autumn|When it rained|After the storm|"
        "After the market|On the way home|After supper|Long ago",
        "an old man|the neighbour|a painter|the boatman|a carpenter|the teacher|a farmer|the tailor|a fisherman|"
        "the shepherd|a guest|the girl next door",
        "watched the clouds drift by|mended a wooden box|counted the people passing|dried a basket of beans|"
        "listened to a story|drank a cup of tea|watered the flowers|repaired a net|played chess with a friend|"
        "wrote a long letter|picked up a leaf|sang a quiet song",
        "by the river|in the yard|at the foot of the hill|on the bridge|at the window|in the fields|on the old street|"
        "in the shade of a tree|near the pier|under the roof|in the tea house|behind the garden",
    ),
}
_SENTENCE = re.compile(r"[^。！？!?.\n]+[。！？!?.]*")
_LONGEST = 400  # characters


def made_up(language: Language, draw: random.Random) -> Iterator[str]:
    """Yield sentences without digits, drawn from 20,736."""
    parts = [text.split("|" if language is Language.ENGLISH else None) for text in _PARTS[language]]
    form = "{}, {} {} {}." if language is Language.ENGLISH else "{}，{}{}{}。"
    while True:
        yield form.format(*map(draw.choice, parts))


def filler_of(path: Path) -> Filler:
    """Sentences of a text file, in their order from a drawn place on, and from its start again behind its end.

    Raises:
        UsageError: there is no such file.
        DataError: it is not UTF-8, or has no sentence of 2 to 400 characters.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--filler {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file first") from None
    found = [sentence.strip() for sentence in _SENTENCE.findall(text)]
    sentences = [sentence for sentence in found if 2 <= len(sentence) <= _LONGEST]
    if not sentences:
        raise DataError(f"{path}: holds no sentence of 2 to {_LONGEST} characters")

    def sentences_of(_: Language, draw: random.Random) -> Iterator[str]:
        at = draw.randrange(len(sentences))
        while True:
            yield sentences[at % len(sentences)]
            at += 1

    return sentences_of
