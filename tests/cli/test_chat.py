"""`megazh chat` in a real terminal and through a pipe, with an untrained model."""

import io
import json
import os
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from made_runs import make_run, write_recipe
from terminals import Terminal, in_terminal

from megazh.cli import main
from megazh.conversation.template import BUILT_IN
from megazh.index.metadata import TemplateInfo

ROOT = Path(__file__).parents[2]
CHATML = TemplateInfo(name="chatml", jinja=BUILT_IN["chatml"], stop="<|im_end|>")
SHAPE = {"vocab_size": 400, "initializer_range": 0.2}
GREEDY = ("--temperature", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Path:
    """A run whose model answers with random tokens, without end."""
    root = tmp_path_factory.mktemp("chat")
    recipe = write_recipe(root / "mini.yaml", stories, model=SHAPE, seq_len=256)
    return make_run(root / "run", recipe, template=CHATML).path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Path:
    """A run without a chat template."""
    root = tmp_path_factory.mktemp("base")
    return make_run(root / "run", write_recipe(root / "mini.yaml", stories, model=SHAPE, seq_len=256)).path


def started(run: Path, *words: str, **env: str):  # type: ignore[no-untyped-def]
    """`megazh chat RUN WORDS` in a terminal."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **env}
    return in_terminal([sys.executable, "-m", "megazh", "chat", run, *GREEDY, *words], environment)


def saved(terminal: Terminal, path: Path) -> list[str]:
    """The texts of all turns, by /save."""
    terminal.type(f"/save {path}\r")
    terminal.expect("turns written to")
    terminal.expect("> ")
    (row,) = path.read_text(encoding="utf-8").splitlines()
    messages = json.loads(row)["messages"]
    assert [each["role"] for each in messages][-2:] == ["user", "assistant"]
    return [each["content"] for each in messages]


def test_a_conversation_in_a_terminal(run: Path, tmp_path: Path) -> None:
    with started(run, "--max-tokens", "8", "--system", "你是助手。") as terminal:
        assert "template chatml, 256 tokens of context. /help" in terminal.expect("lists commands.")
        terminal.expect("> ")

        # Characters of two columns: Backspace takes one whole, and goes back by two columns.
        terminal.type("中文错")
        terminal.expect("中文错")
        terminal.type("\x7f")
        terminal.expect("\b\b")
        terminal.type("字🙂")
        terminal.expect("字🙂")
        terminal.type("\x1b[D\x1b[D好\r")  # two to the left, and in between
        terminal.expect("(cut after 8 tokens, which is the limit that was set)")
        terminal.expect("> ")

        # A paste of several lines is one message; the terminal marks its begin and its end.
        terminal.type("\x1b[200~第一行\r第二行\n/reset\x1b[201~\r")
        terminal.expect("that was set)")
        terminal.expect("> ")
        texts = saved(terminal, tmp_path / "first.jsonl")
        assert texts[0] == "你是助手。"
        assert (texts[1], texts[3]) == ("中文好字🙂", "第一行\n第二行\n/reset")

        terminal.type("/retry\r")
        terminal.expect("that was set)")
        terminal.expect("> ")
        terminal.type("//etc 是什么？\r")
        terminal.expect("that was set)")
        terminal.expect("> ")
        second = saved(terminal, tmp_path / "second.jsonl")
        assert second[:5] == texts, "greedy: the same answer once more, in the place of the first"
        assert second[5] == "/etc 是什么？"

        for typed, expected in [
            ("/nothing\r", "error: /nothing: no command; /help lists them"),
            (f"/save {run / 'config.yaml'}\r", "config.yaml: exists already; give another name"),
            (f"/save {run / 'config.yaml' / 'no'}\r", "error: "),
            ("/save\r", "error: /save: give the name of a file"),
            ("/help\r", "/retry          answer the last message again"),
            (f"{'长' * 300}\r", "tokens with all that the template puts around it, and the model takes 256 at a time"),
            ("/system\r", "(no system turn)"),
            ("/system 短一点。\r", "(the system turn is set)"),
            ("/reset\r", "(a new conversation)"),
            (f"/save {tmp_path / 'third.jsonl'}\r", "error: /save: nothing was said yet"),
            ("新的\r", "that was set)"),
        ]:
            terminal.type(typed)
            terminal.expect(expected)
            terminal.expect("> ")
        assert saved(terminal, tmp_path / "third.jsonl")[:2] == ["短一点。", "新的"]
        for number in range(12):
            terminal.type(f"第{number}个问题，{'很长' * 6}\r")
        terminal.expect("turns no longer fit into 256 tokens; the model forgets them)")
        terminal.type("/exit\r")
        assert terminal.end() == 0


def test_ctrl_c_interrupts_an_answer_and_ends_at_the_prompt(run: Path, tmp_path: Path) -> None:
    with started(run, "--max-tokens", "20000", "--context", "20480", LC_ALL="C") as terminal:
        terminal.expect("> ")
        terminal.type("中文\x7f国\r")
        terminal.expect("\n")
        shown = terminal.more(60)
        terminal.type("\x03")
        terminal.expect("(interrupted; the answer stays in the conversation as shown)")
        terminal.expect("> ")
        texts = saved(terminal, tmp_path / "saved.jsonl")
        assert texts[0] == "中国"
        assert texts[1].replace("\n", "\r\n")[:40] in shown

        terminal.type("half a line")
        terminal.expect("half a line")
        time.sleep(0.5)  # Python notices a signal once it waits for a key, not just before
        terminal.type("\x03")
        terminal.expect("(Ctrl-C again, Ctrl-D or /exit ends the chat)")
        terminal.expect("> ")
        time.sleep(0.5)
        terminal.type("\x03")
        assert terminal.end() == 0
    with started(run, "--max-tokens", "20000", "--context", "20480") as terminal:
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def chat(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: str, *words: str | Path
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh chat WORDS` with lines on stdin."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode("utf-8", "surrogateescape"))))
    with pytest.raises(SystemExit) as ended:
        main(["chat", *map(str, words), "--device", "cpu"])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_line_is_a_message_in_a_pipe(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (run, "--temperature", "0", "--max-tokens", "6", "--system", "你是助手。")
    code, one, err = chat(capfd, monkeypatch, "你好\n", *words)
    assert (code, err) == (0, "note: cut after 6 tokens, which is the limit that was set\n")
    code, two, err = chat(capfd, monkeypatch, "你好\r\n\n再说一次", *words)
    assert code == 0
    assert two.startswith(one)
    assert len(two) > len(one)
    assert err.count("note: cut") == 2
    code, two, err = chat(capfd, monkeypatch, f"{'长' * 300}\n你好\n", *words)
    assert (code, two) == (2, one), "the others are answered"
    assert err.startswith("error: the message has ")
    code, two, err = chat(capfd, monkeypatch, "\udcff\n你好\n", *words)
    assert (code, two) == (2, one)
    assert err.startswith("error: the message is not valid UTF-8")
    assert chat(capfd, monkeypatch, "", *words) == (0, "", "")
    _, _, err = chat(capfd, monkeypatch, "", *words, "--context", "500")
    assert err == (
        "warning: --context 500: the model was trained on 256 tokens at a time, and may write nonsense behind them\n"
    )


def test_sampling_options_count(run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*words: str) -> str:
        return chat(capfd, monkeypatch, "你好\n", run, "--system", "你是助手。", "--max-tokens", "40", *words)[1]

    greedy = answer("--temperature", "0")
    assert answer("--top-k", "1") == greedy
    assert answer("--temperature", "0", "--repetition-penalty", "5") != greedy
    assert answer("--temperature", "0", "--additive-penalty", "9", "--penalty-decay", "1") != greedy
    assert answer("--temperature", "2", "--seed", "1") == answer("--temperature", "2", "--seed", "1") != greedy


def test_a_base_model_is_refused_and_a_template_forces_it(
    base: Path, run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = chat(capfd, monkeypatch, "你好\n", base)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "a base model, which has no chat template: '" in err
    assert "sample' continues a text with it, and --template chatml asks it" in err
    words = ("--template", "chatml", "--temperature", "0", "--max-tokens", "6")
    code, out, _ = chat(capfd, monkeypatch, "你好\n", base, *words)
    assert (code, out) == (0, chat(capfd, monkeypatch, "你好\n", run, *words)[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "-1"], "--seed -1: expected a number from 0"),
        (["--top-p", "0"], "top_p 0.0"),
        (["--template", "nowhere.jinja"], "--template nowhere.jinja: neither chatml, human-assistant nor a file"),
        (["--system", "长" * 300], "the system turn has"),
        (["--system", " "], "the system turn is empty"),
        (["--checkpoint", "step_7"], "no checkpoint 'step_7'"),
    ],
)
def test_refused_in_one_line(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    code, out, err = chat(capfd, monkeypatch, "你好\n", run, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed")
def test_a_page_needs_gradio(run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = chat(capfd, monkeypatch, "", run, "--web")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--web needs gradio, which is not installed: install the extra 'web' (bash jobs/setup.sh --web)" in err


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed (bash jobs/setup.sh --web)")
def test_a_page_is_served_until_ctrl_c(run: Path) -> None:
    with started(run, "--web", "--port", "7874") as terminal:
        terminal.expect("http://127.0.0.1:7874/ (Ctrl-C ends)")
        with urllib.request.urlopen("http://127.0.0.1:7874/", timeout=30) as page:
            assert "template chatml, 256 tokens of context" in page.read().decode()
        terminal.type("\x03")
        assert terminal.end() == 0
