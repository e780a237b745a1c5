"""The demo corpus: Chinese micro-stories of the project's own, told by rules from a seed; no data to download."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from megazh.corpus import story_friends, story_lessons
from megazh.corpus.story_words import Frame, Teller
from megazh.files import write_atomic

PLOTS: dict[str, Callable[[Teller], Frame]] = {**story_friends.PLOTS, **story_lessons.PLOTS}
"""All plots; a story follows one of them, each as often as the others."""
_TITLED = 0.4
_MORAL = 0.35


def story(seed: int, number: int) -> str:
    """Story `number` of the corpus that `seed` names: a few paragraphs of about 120 to 350 characters in all.

    A pure function of both. Some stories have a title line 《…》, some end with a moral. Sums, shares, prices and
    times in a story are right, and those who are named keep their names and pronouns.
    """
    teller = Teller(random.Random(f"{seed}/{number}"))  # text is hashed with SHA-512, the same in every process
    titles, morals = PLOTS[teller.one(list(PLOTS))](teller)
    if teller.chance(_MORAL):
        moral = teller.one(morals)
        teller.paragraph()
        teller.tell(f"这个故事告诉我们：{moral}", f"大家都说：“{moral}”", moral)
    title = f"《{teller.one(titles)}》\n" if teller.chance(_TITLED) else ""
    return title + teller.text()


def write_stories(path: Path, count: int, seed: int) -> None:
    """Write stories 0 to `count` - 1 as JSON Lines with the key `text`; the same bytes for the same arguments.

    Atomic: `path` holds what it held before, or all of them.
    """
    lines = (json.dumps({"text": story(seed, number)}, ensure_ascii=False) for number in range(count))
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
