"""Stories: reproducible from a seed, all different, and consistent in arithmetic, names and pronouns."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from textdata import is_one_line_error, megazh

from megazh.demo import stories
from megazh.demo.stories import story, write_stories
from megazh.demo.words import FOREST, VILLAGE, Being, Teller, hanzi, they

COUNT = 10_000
VALUES = {hanzi(number): number for number in range(1000)} | {"两": 2}
NUMBER = r"(\d+|[零一二三四五六七八九十百两]+)"


@pytest.fixture(scope="module")
def told() -> list[tuple[str, str]]:
    """(plot, text) of stories 0 to COUNT - 1 of seed 3."""
    found: list[tuple[str, str]] = []
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, plot in list(stories.PLOTS.items()):

            def recorded(teller: Teller, name: str = name, plot: object = plot) -> object:
                names.append(name)
                return plot(teller)  # type: ignore[operator]

            patch.setitem(stories.PLOTS, name, recorded)
        for number in range(COUNT):
            text = story(3, number)
            found.append((names[-1], text))
    return found


def of_plot(told: list[tuple[str, str]], plot: str) -> list[str]:
    found = [text for name, text in told if name == plot]
    assert len(found) > COUNT / 30
    return found


def numbers(pattern: str, text: str) -> list[int]:
    """Numbers that NUM stands for in the first match of `pattern` in `text`; [] if there is no match."""
    match = re.search(pattern.replace("NUM", NUMBER), text)
    return [VALUES[group] if group in VALUES else int(group) for group in match.groups() if group] if match else []


def test_a_story_is_a_pure_function_of_seed_and_number() -> None:
    digest = hashlib.sha256(story(1, 7).encode()).hexdigest()
    assert digest == "a62fb64b5240bbd3134bd5c4004398349ed1dcabc7a0aac0065e36b2b5ce619e"
    assert story(1, 7) == story(1, 7)
    assert len({story(1, 7), story(1, 8), story(2, 7)}) == 3


def test_all_different_and_of_every_plot(told: list[tuple[str, str]]) -> None:
    assert len({text for _, text in told}) >= 0.999 * COUNT
    plots = Counter(name for name, _ in told)
    assert plots.keys() == stories.PLOTS.keys()
    assert len(plots) >= 10
    assert min(plots.values()) > 0.8 * COUNT / len(plots)


def test_lengths_and_characters(told: list[tuple[str, str]]) -> None:
    lengths = sorted(len(text) for _, text in told)
    assert lengths[0] >= 110
    assert lengths[-1] <= 360
    assert len(set("".join(text for _, text in told))) <= 900


def test_well_formed(told: list[tuple[str, str]]) -> None:
    titled = 0
    for _, text in told:
        assert not re.search(r"[，。！？：、；]{2}|[{}]|[a-zA-Z]|\n\n| ", text), text
        assert text.count("“") == text.count("”"), text
        first, *lines = text.split("\n")
        if first.startswith("《"):
            titled += 1
            assert first.endswith("》"), text
        else:
            lines.append(first)
        assert all(line and line[-1] in "。！？”" for line in lines), text
    assert 0.3 < titled / COUNT < 0.5


def test_sums_and_shares_are_right(told: list[tuple[str, str]]) -> None:
    heads_seen = set()
    for text in of_plot(told, "share"):
        picked = [
            VALUES[n] if n in VALUES else int(n)
            for n in re.findall(f"(?:摘了|又送来|又给了.们|给了.们){NUMBER}个", text)
        ]
        *terms, total = numbers("NUM加NUM(?:加NUM)?等于NUM", text)
        assert terms == picked, text
        assert total == sum(terms), text
        heads, each = numbers("NUM个小伙伴，(?:平均分，)?每个分到NUM个", text)
        left = numbers("剩下NUM个", text)
        assert total == heads * each + sum(left), text
        assert sum(left) < heads
        assert bool(left) != ("刚好分完" in text or "不多不少" in text), text
        heads_seen.add(heads)
        assert len(children_in(text)) == heads, text
    assert heads_seen == {2, 3, 4}


def test_prices_and_change_are_right(told: list[tuple[str, str]]) -> None:
    item = "NUM元(?:一.)?，NUM.(?:是|要)NUM元[；。]"
    mistakes = 0
    for text in of_plot(told, "market"):
        price, many, cost, price_two, many_two, cost_two = numbers(f"{item}.*?{item}", text)
        (total,) = numbers("一共(?:是)?NUM元", text)
        (paid,) = numbers("(?:拿出|付了)NUM元", text)
        assert (cost, cost_two, total) == (price * many, price_two * many_two, cost + cost_two), text
        if wrong := numbers("应该找回NUM元.*?找了NUM元", text):
            mistakes += 1
            assert wrong[0] == paid - total, text
            assert numbers("多(?:给了我|了)NUM元", text) == [wrong[1] - wrong[0]], text
        else:
            assert numbers("(?:找回|找给.)NUM元", text) == [paid - total], text
    assert mistakes


def test_hours_heights_and_progress_are_right(told: list[tuple[str, str]]) -> None:
    for text in of_plot(told, "trip"):
        leave, hours, arrive = numbers("早上NUM点.*?NUM个小时.*?NUM点", text)
        assert arrive == leave + hours, text
    for text in of_plot(told, "tree"):
        before, grown, after = numbers("高?NUM厘米.*?长[高了]+NUM厘米.*?NUM厘米", text.replace("\n", ""))
        assert after == before + grown, text
    for text in of_plot(told, "learn"):
        verb = r"(?:跳|踢|写对|背|拍|游)"
        (first,) = numbers(f"只{verb}了NUM", text)
        last, more = numbers(f"(?:一口气{verb}了|能{verb})NUM.*?多了?NUM", text)
        assert more == last - first, text


def test_what_is_lost_is_found_where_it_was_left(told: list[tuple[str, str]]) -> None:
    for text in of_plot(told, "lost"):
        haunts = [haunt for haunt in (*VILLAGE.haunts, *FOREST.haunts) if f"在{haunt.place}{haunt.doing}" in text]
        assert len(haunts) == 3, text
        end = text[re.search("忽然叫起来|眼睛一亮", text).start() :]  # type: ignore[union-attr]
        (haunt,) = [haunt for haunt in haunts if haunt.spot in end]
        assert f"{haunt.doing}的时候" in end, text


def children_in(text: str) -> list[Being]:
    return [being for being in (*VILLAGE.children, *FOREST.children) if being.full in text]


def test_names_are_introduced_and_pronouns_agree(told: list[tuple[str, str]]) -> None:
    for _, text in told:
        body = text.split("》\n")[-1]
        beings = children_in(body)
        elders = [being for being in (*VILLAGE.elders, *FOREST.elders) if being.full in body]
        assert 1 <= len(beings) <= 4, text
        assert len(elders) <= 1, text
        animals = {being.pronoun == "它" for being in (*beings, *elders)}
        assert len(animals) == 1, text
        for being in (*VILLAGE.children, *FOREST.children):
            if being.name in body:
                assert being in beings, text
                assert body.index(being.name) >= body.index(being.full), text
        pronouns = {being.pronoun for being in (*beings, *elders)}
        people = set(re.findall("[他她]", re.sub("[他她]们", "", body)))
        assert people <= pronouns, text
        for plural in set(re.findall("([他她它])们", body)):
            assert plural in pronouns, text
            assert plural != "她" or [being.pronoun for being in beings].count("她") + len(elders) >= 2, text


def test_plural_of_boys_girls_and_animals() -> None:
    boy, girl, animal = Being("小明", "小明", "他"), Being("小红", "小红", "她"), Being("小羊", "小羊", "它")
    assert (they(boy, girl), they(girl, girl), they(animal, animal)) == ("他们", "她们", "它们")


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (0, "零"),
        (7, "七"),
        (10, "十"),
        (12, "十二"),
        (20, "二十"),
        (99, "九十九"),
        (100, "一百"),
        (105, "一百零五"),
        (112, "一百一十二"),
        (930, "九百三十"),
    ],
)
def test_numbers_in_chinese(number: int, written: str) -> None:
    assert hanzi(number) == written


def test_file_of_stories(tmp_path: Path) -> None:
    write_stories(tmp_path / "a.jsonl", 30, 4)
    code, out, err = megazh("stories", "--count", 30, "--seed", 4, "--output", tmp_path / "new" / "b.jsonl")
    assert (code, err) == (0, "")
    assert "30 stories" in out
    data = (tmp_path / "a.jsonl").read_bytes()
    assert data == (tmp_path / "new" / "b.jsonl").read_bytes()
    assert [json.loads(line) for line in data.splitlines()] == [{"text": story(4, number)} for number in range(30)]


def test_a_folder_is_no_file_of_stories(tmp_path: Path) -> None:
    code, _, err = megazh("stories", "--output", tmp_path)
    assert code == 2
    assert is_one_line_error(err, tmp_path, "folder")
