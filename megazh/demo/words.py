"""Material of the stories: characters, places, things, weather and numbers, and the `Teller` that draws from them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Frame = tuple[tuple[str, ...], tuple[str, ...]]
"""(titles, morals) that fit a story."""


@dataclass(frozen=True)
class Being:
    """A person or animal in a story."""

    full: str
    """Name at the first mention, such as 小兔子雪团."""
    name: str
    """Name from then on, a part of `full`, such as 雪团."""
    pronoun: str
    """Pronoun: 他, 她 or 它."""


@dataclass(frozen=True)
class Haunt:
    """A place where a character can leave something behind."""

    place: str
    doing: str
    """Activity at the place."""
    spot: str
    """Spot at the place where a thing can lie."""


@dataclass(frozen=True)
class World:
    """Characters and places that fit together: people in a village, or animals in a forest."""

    homes: tuple[str, ...]
    children: tuple[Being, ...]
    elders: tuple[Being, ...]
    haunts: tuple[Haunt, ...]


def _beings(names: str, pronoun: str) -> tuple[Being, ...]:
    """Beings from words separated by spaces: `NAME`, or `SPECIES+NAME` for an animal."""
    return tuple(Being(word.replace("+", ""), word.split("+")[-1], pronoun) for word in names.split())


def _haunts(lines: str) -> tuple[Haunt, ...]:
    return tuple(Haunt(*line.split("/")) for line in lines.split())


VILLAGE = World(
    homes=("村子里", "小镇上", "山脚下的村子里", "河边的小镇上", "城里的一条小街上"),
    children=_beings("小明 小刚 小军 小强 阿福 冬冬 乐乐 大伟 志远 小海 阿亮 子安", "他")
    + _beings("小红 小丽 小芳 小梅 小雪 朵朵 圆圆 妞妞 思雨 小兰 阿秀 月月", "她"),
    elders=_beings("王爷爷 赵爷爷 张叔叔 周伯伯", "他") + _beings("李奶奶 孙奶奶 陈阿姨 林阿姨", "她"),
    haunts=_haunts(
        "公园/看花/长椅上 图书馆/看书/书架旁边 操场/跑步/大树下 河边/捉小鱼/石头后面 菜园/浇水/篱笆上 "
        "车站/等妹妹/椅子底下 池塘边/看鸭子/柳树下 小店/买铅笔/柜台上 戏台前/听戏/台阶上"
    ),
)
FOREST = World(
    homes=("森林里", "山谷里", "小河边的树林里", "大山里的一片草地上", "湖边的林子里"),
    children=_beings(
        "小兔子+雪团 小熊+胖胖 小猫+咪咪 小狐狸+阿红 小松鼠+果果 小鹿+花花 小猴子+皮皮 小羊+绵绵 小象+墩墩 "
        "小刺猬+球球 小鸭子+丫丫 小狗+旺旺 小老鼠+吱吱 小青蛙+呱呱",
        "它",
    ),
    elders=_beings("山羊爷爷 乌龟爷爷 猫头鹰奶奶 黄牛伯伯 河马大叔 喜鹊阿姨 大雁阿姨 白马伯伯", "它"),
    haunts=_haunts(
        "河边/玩水/大石头后面 草地上/追蝴蝶/花丛里 山坡上/晒太阳/老松树下 树林里/采蘑菇/树洞里 "
        "小桥边/看鱼/桥头的木桩上 瓜地里/捉迷藏/草堆旁边 泉水边/洗脸/石板上 竹林里/挖竹笋/竹筐里 "
        "山洞口/听回声/洞口的石头上"
    ),
)

WEATHER = {
    "春天": ("阳光暖暖的", "风轻轻地吹着", "路边的花都开了", "小雨刚刚停", "柳树长出了新叶", "燕子从南方飞回来了"),
    "夏天": (
        "知了在树上叫个不停",
        "天空蓝蓝的，没有一朵云",
        "池塘里开满了荷花",
        "阳光照得树叶闪闪发亮",
        "蜻蜓在水面上飞来飞去",
    ),
    "秋天": ("树叶黄了", "天高高的，云淡淡的", "凉风一阵一阵地吹来", "田里一片金黄", "大雁排成一行往南飞"),
    "冬天": ("雪刚刚停", "北风呼呼地吹着", "屋顶上盖着一层白雪", "河面结了冰", "天空飘着小小的雪花"),
}
COLOURS = ("红色", "蓝色", "黄色", "绿色", "白色", "紫色")
THINGS = (  # (thing, measure word), small enough to be left anywhere
    ("帽子", "顶"),
    ("围巾", "条"),
    ("水壶", "个"),
    ("口琴", "个"),
    ("铅笔盒", "个"),
    ("小鼓", "面"),
    ("雨伞", "把"),
    ("铃铛", "个"),
    ("布袋", "个"),
    ("笔记本", "本"),
    ("手套", "副"),
    ("小灯笼", "个"),
)
FRUITS = (  # (fruit, season in which it is ripe)
    ("苹果", "秋天"),
    ("梨", "秋天"),
    ("橘子", "秋天"),
    ("柿子", "秋天"),
    ("桃子", "夏天"),
    ("杏子", "夏天"),
    ("李子", "夏天"),
    ("草莓", "春天"),
    ("石榴", "秋天"),
)
_DIGITS = "零一二三四五六七八九"


def hanzi(number: int) -> str:
    """`number`, from 0 to 999, in Chinese numerals: 12 is 十二, 105 is 一百零五."""
    if number >= 100:
        rest = number % 100
        tail = "" if not rest else f"零{hanzi(rest)}" if rest < 10 else _DIGITS[rest // 10] + hanzi(rest % 10 + 10)
        return f"{_DIGITS[number // 100]}百{tail}"
    if number < 10:
        return _DIGITS[number]
    tens = "" if number < 20 else _DIGITS[number // 10]
    return f"{tens}十{_DIGITS[number % 10] if number % 10 else ''}"


class Teller:
    """Draws the material of one story at random, and collects its sentences.

    Args:
        draw: the only source of randomness.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._paragraphs = [""]
        self._digits = draw.random() < 0.5
        self.world = VILLAGE if draw.random() < 0.5 else FOREST

    def one(self, options: Sequence[Item]) -> Item:
        """One of `options`, drawn uniformly."""
        return self._draw.choice(options)

    def some(self, options: Sequence[Item], count: int) -> list[Item]:
        """`count` different options, in random order."""
        return self._draw.sample(options, count)

    def between(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return self._draw.randint(low, high)

    def chance(self, share: float = 0.5) -> bool:
        """True with probability `share`."""
        return self._draw.random() < share

    def number(self, number: int) -> str:
        """`number` as this story writes numbers: always in digits, or always in Chinese numerals."""
        return str(number) if self._digits else hanzi(number)

    def count(self, number: int, measure: str) -> str:
        """`number` with a measure word: 12个, 十二个, 两个."""
        return f"{'两' if number == 2 and not self._digits else self.number(number)}{measure}"

    def tell(self, *variants: str) -> None:
        """Add one variant of a sentence to the story."""
        self._paragraphs[-1] += self.one(variants)

    def perhaps(self, *variants: str) -> None:
        """Add one variant of a sentence, or (half the time) nothing."""
        if self.chance():
            self.tell(*variants)

    def paragraph(self) -> None:
        """Begin a new paragraph."""
        self._paragraphs.append("")

    def children(self, count: int) -> list[Being]:
        """`count` different children of this story's world."""
        return self.some(self.world.children, count)

    def elder(self) -> Being:
        """One of the elders of this story's world."""
        return self.one(self.world.elders)

    def opening(self, *seasons: str, times: Sequence[str] = ("早晨", "上午", "下午")) -> str:
        """Add a sentence about season, weather and perhaps time of day; returns the season, from `seasons` (or all)."""
        season = self.one(seasons or tuple(WEATHER))
        time, weather = self.one(times), self.one(WEATHER[season])
        self.tell(
            f"{season}的一个{time}，{weather}。", f"{season}到了，{weather}。", f"那是{season}的{time}，{weather}。"
        )
        return season

    def friends(self, first: Being, second: Being) -> None:
        """Add a sentence that introduces two friends."""
        home = self.one(self.world.homes)
        self.tell(
            f"{home}住着{first.full}和{second.full}，{they(first, second)}是最好的朋友。",
            f"{first.full}和{second.full}是一对好朋友，住在{home}。",
            f"{first.full}和{second.full}都住在{home}，天天在一起玩。",
        )

    def text(self) -> str:
        """The story so far, one line per paragraph."""
        return "\n".join(self._paragraphs)


def they(*beings: Being) -> str:
    """Plural pronoun: 她们 or 它们 if all have the pronoun 她 or 它, otherwise 他们."""
    pronouns = {being.pronoun for being in beings}
    return f"{pronouns.pop() if len(pronouns) == 1 else '他'}们"
