"""The report of a run: a page that stands alone, also of a run that is under way, old, damaged or incomplete."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import add_checkpoint, make_run, write_metrics, write_recipe

from megazh.errors import UsageError
from megazh.run.folder import RunFolder
from megazh.run.metrics import METRICS, Metrics
from megazh.run.records import CorpusValidation
from megazh.training.checkpoint_list import read_manifest
from megazh.training.recipe import run_recipe
from megazh.training.report.page import write_report
from megazh.training.saver import write_manifest

SCRIPT = "<script>alert('喵')</script> & \"x\"\n第二行"


class Page(HTMLParser):
    """What a browser finds on a page: elements with their attributes, texts, and the cells of tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, attribute: str) -> list[str]:
        """The values of an attribute, wherever it stands."""
        return [value for _, attributes in self.elements if (value := attributes.get(attribute))]

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run of six steps with two checkpoints, and a sample that holds HTML."""
    run = make_run(tmp_path / "小<b>故事", write_recipe(tmp_path / "mini.yaml", stories))
    add_checkpoint(run, run_recipe(run), 4)
    write_metrics(run, 6)
    with Metrics(run.path, 6, quiet=False) as metrics:
        metrics.sample(6, "从前</td>", SCRIPT)
        metrics.validation(
            6,
            1536,
            2.5,
            2.0,
            4,
            {"法<i>律": CorpusValidation.of(2.25, 1.75, 2), "诗": CorpusValidation.of(2.75, 2.25, 2)},
        )
        metrics.event(6, "stop", "stopped by a <person>")
        metrics.event(4, "rollback", "back to step 4", from_step=6)
    return run


def report(run: RunFolder) -> tuple[Page, list[str]]:
    problems = write_report(run.path, run.path / "report.html")
    return Page(run.path / "report.html"), problems


def test_the_page_has_all_that_the_run_holds(run: RunFolder) -> None:
    page, problems = report(run)
    assert problems == []
    texts = set(page.texts)
    assert {"小<b>故事", "Curves", "Samples", "Data", "Checkpoints", "Attempts", "Recipe"} <= texts
    assert {"Complete: 6 steps."} <= {text[: len("Complete: 6 steps.")] for text in page.texts}
    assert {"step_00000004", "step_00000006", "complete: the run's last step", "2.5000"} <= texts
    assert {"hidden_size", "32", "learning_rate", "0.01"} <= texts
    assert run.info().corpora[0].sha256[:12] in texts
    assert run.info().attempts[0].command in texts
    assert page.elements.count(("figcaption", {})) == 4, "no memory without GPUs, no second half of six steps"


def test_a_checkpoint_that_was_the_last_before_the_run_was_extended_is_not_called_complete(run: RunFolder) -> None:
    path = run.checkpoints / "step_00000004"
    write_manifest(path, read_manifest(path).model_copy(update={"complete": True}))
    texts = report(run)[0].texts
    assert texts.count("complete: the run's last step") == 1
    assert "whole" in texts


def test_the_page_needs_nothing_else_and_runs_nothing(run: RunFolder) -> None:
    page, _ = report(run)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert all(value.startswith("#") for name in ("href", "xlink:href", "src") for value in page.values(name))
    assert [value for value in page.values("content") if "default-src 'none'" in value]
    ids = page.values("id")
    assert len(set(ids)) == len(ids) > 0
    assert {value[1:] for value in page.values("xlink:href")} <= set(ids)


def test_text_of_the_model_is_text(run: RunFolder) -> None:
    page, _ = report(run)
    assert SCRIPT in page.texts
    assert "从前</td>" in page.texts
    assert page.elements.count(("b", {})) > 0
    assert not [tag for tag, _ in page.elements if tag == "script"]


def test_how_attempts_ended(run: RunFolder) -> None:
    run.end(5, "rank 1 <died>")
    page, _ = report(run)
    assert [text for text in page.texts if text.startswith("rank 1 <died>, exit code 5, at 20")]


def test_validation_by_corpus_is_drawn_and_listed(run: RunFolder) -> None:
    page, _ = report(run)
    at = page.texts.index("Validation by corpus")
    assert {"法<i>律", "2.2500", "9.488", "1.7500"} <= set(page.texts[at : at + 40])
    assert page.texts.count("法<i>律") == 2, "the table, and the legend of the losses"


def test_events_are_in_the_order_of_time(run: RunFolder) -> None:
    page, _ = report(run)
    assert 0 < page.texts.index("stopped by a <person>") < page.texts.index("back to step 4")
    assert "rollback (1)" in page.texts, "the legend of the losses"


def test_keys_that_differ_from_their_defaults_show_both(run: RunFolder) -> None:
    page, _ = report(run)
    at = page.texts.index("validation_samples")
    assert page.texts[at : at + 4] == ["validation_samples", "4", " ", "default: null"]
    assert page.texts[page.texts.index("decayed") + 1] == "[embedding, head, matrix]"


def test_a_run_without_metrics(run: RunFolder) -> None:
    (run.path / METRICS).unlink()
    page, problems = report(run)
    assert len(problems) == 1
    assert "metrics.jsonl: no such file" in problems[0]
    assert problems[0] in page.texts
    assert "Recipe" in page.texts
    assert "svg" not in page.tags


def test_a_run_with_metrics_alone_that_diverged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "old")
    write_metrics(run, 60)
    lines = [json.loads(line) for line in (run.path / METRICS).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line.pop("time")
        if line["kind"] == "step" and line["step"] > 30:
            line |= {"loss": str(math.nan), "grad_norm": str(math.inf), "skipped": True}
    (run.path / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    page, problems = report(run)
    assert [problem.split(": ")[1] for problem in problems] == ["not the folder of a run", "missing or damaged"]
    assert page.texts.count("the gradients were not finite") == 30
    assert page.elements.count(("figcaption", {})) == 5


def test_damaged_files_are_named(run: RunFolder) -> None:
    (run.path / "run.json").write_text("{")
    run.config.write_text("model: [")
    (run.checkpoints / "step_00000004" / "weights" / "norm.safetensors").unlink()
    page, problems = report(run)
    assert len(problems) == 3
    assert set(problems) <= set(page.texts)
    assert "damaged: weights/norm.safetensors: missing" in page.texts
    assert "svg" in page.tags


def test_refusals(tmp_path: Path, run: RunFolder) -> None:
    with pytest.raises(UsageError, match="it has none of config"):
        write_report(tmp_path, tmp_path / "x.html")
    with pytest.raises(UsageError, match="not the folder of a run"):
        write_report(tmp_path / "nothing", tmp_path / "x.html")
    with pytest.raises(UsageError, match=r"x\.pdf: a report is a page"):
        write_report(run.path, tmp_path / "x.pdf")
