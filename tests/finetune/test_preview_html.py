"""A preview as a page."""

from html.parser import HTMLParser
from pathlib import Path

from previews import FITTING, preview, rows_file

from megazh.finetune.preview_html import write_html


class _Page(HTMLParser):
    """The text of a page, that of its marks, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.text = self.marked = ""
        self.elements: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onerror"}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "mark" in self.open and "pre" in self.open:
            self.marked += data


def test_the_page_is_whole_and_text_is_text(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&lt;"
    rows = [{"instruction": evil, "output": f"好{evil}"}, {"instruction": "问", "output": "答" * 3000}]
    path = tmp_path / "new" / "page.html"
    write_html(path, preview(rows_file(tmp_path, rows)), FITTING, "Preview of <b>")
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert (page.open, page.elements.count("pre")) == ([], 2)
    assert not {"script", "img", "b", "link"} & set(page.elements)
    assert page.marked == f"好{evil}<|im_end|>{'答' * 3000}<|im_end|>"
    assert f"<|im_start|>user\n{evil}<|im_end|>\n" in page.text
