"""A chat model on its way: template and end tokens from a checkpoint to a folder, to transformers, and back."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import make_run, write_recipe
from transformers_peer import VERSIONS, ask

from megazh.conversation.conversation import Role, Turn
from megazh.conversation.template import BUILT_IN
from megazh.errors import DataError, UsageError
from megazh.finetune.chat import Chat, ChatModel, ChatOptions, End
from megazh.index.metadata import TemplateInfo
from megazh.model.sampling import SamplingOptions
from megazh.training.chat_template import find_template
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.imported import import_folder
from megazh.training.model_source import find_model
from megazh.training.text_model import open_model, open_source

CHATML = TemplateInfo(name="chatml", jinja=BUILT_IN["chatml"], stop="<|im_end|>")
HUMAN = TemplateInfo(name="human-assistant", jinja=BUILT_IN["human-assistant"], stop="<|endoftext|>")
OPTIONS = ChatOptions(SamplingOptions(temperature=0.0), max_tokens=24)
QUESTIONS = ["小兔子叫什么名字？", "它住在\n哪里 <b>？", "再见🙂"]
SHAPE = {"vocab_size": 400, "num_key_value_heads": 2, "qkv_bias": True, "initializer_range": 0.2, "rope_theta": 5e5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> tuple[Path, Path, Path]:
    """A run with a chat template, the folder that it was exported to, and the folder that this was imported to."""
    root = tmp_path_factory.mktemp("chat")
    recipe = write_recipe(root / "mini.yaml", stories, model=SHAPE, seq_len=512)
    run = make_run(root / "run", recipe, template=CHATML)
    export_to_hf(find_model(run.path), root / "hf", ExportOptions())
    import_folder(root / "hf", root / "imported")
    return run.path, root / "hf", root / "imported"


def open_chat(path: Path, given: str | None = None) -> Chat:
    """A chat with a model, as `megazh chat` opens it."""
    source = find_model(path)
    return Chat(ChatModel(open_source(source, "cpu"), find_template(source, given)), "你是助手。")


@functools.cache
def talk(path: Path) -> tuple[list[dict[str, str]], list[End | None]]:
    """A conversation of all questions, and how the answers ended."""
    chat, ends = open_chat(path), []
    for question in QUESTIONS:
        answer = chat.ask(question, OPTIONS)
        list(answer)
        ends.append(answer.end)
    return chat.messages(), ends


def test_run_export_and_import_answer_the_same(folders: tuple[Path, Path, Path]) -> None:
    (checkpoint,) = (folders[0] / "checkpoints").iterdir()
    first = talk(folders[0])
    assert len(first[0]) == 7
    assert [talk(path) for path in (checkpoint, *folders[1:])] == [first] * 3
    sources = [find_model(path) for path in folders]
    assert {find_template(source).jinja for source in sources} == {CHATML.jinja}
    assert len({open_source(source, "cpu").end_ids for source in sources}) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_transformers_gives_the_same_answers(folders: tuple[Path, Path, Path], version: str) -> None:
    messages, _ = talk(folders[0])
    asked = [messages[: length + 1] for length in (1, 3, 5)]
    found = ask(
        version, [{"what": "chatted", "folder": str(folders[1]), "messages": each, "count": 24} for each in asked]
    )
    model = open_chat(folders[0]).model
    for given, answer, said in zip(asked, found, messages[2::2], strict=True):
        prompt = model.prompt([Turn(Role(each["role"]), each["content"]) for each in given])
        assert answer["prompt"] == answer["direct"] == prompt
        assert answer["text"].rstrip("\ufffd") == said["content"].rstrip("\ufffd")
        assert set(answer["eos"]) == model.stop_ids


def test_the_model_card_shows_how_to_chat(folders: tuple[Path, Path, Path]) -> None:
    card = (folders[1] / "README.md").read_text()
    assert "template chatml; answers end with `<|im_end|>`" in card
    pytest.importorskip("transformers")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=folders[1].parent, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout.strip() != b"") == (0, True), done.stderr


def test_what_stands_in_the_folder(folders: tuple[Path, Path, Path]) -> None:
    config = json.loads((folders[1] / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (folders[1] / "chat_template.jinja").read_text() == CHATML.jinja
    ends = json.loads((folders[1] / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = find_model(folders[1]).tokenizer()
    assert [tokenizer.piece(each) for each in ends] == ["<|im_end|>", "<|endoftext|>"]


def test_a_template_that_ends_answers_as_documents(tmp_path: Path, stories: Path) -> None:
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories), template=HUMAN)
    export_to_hf(find_model(run.path), tmp_path / "hf", ExportOptions())
    end = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert end == find_model(run.path).tokenizer().eod_id
    assert open_model(run.path).end_ids == {end}


def test_a_base_model_has_no_template(tmp_path: Path, stories: Path) -> None:
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories, seq_len=128))
    export_to_hf(find_model(run.path), tmp_path / "hf", ExportOptions())
    for path in (run.path, tmp_path / "hf"):
        with pytest.raises(UsageError, match="a base model, which has no chat template: 'megazh sample' continues"):
            find_template(find_model(path))
        assert find_template(find_model(path), "chatml").stop == "<|im_end|>"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_template_that_begins_with_a_token_of_its_own(
    folders: tuple[Path, Path, Path], tmp_path: Path, version: str
) -> None:
    """As those of Llama 3; the token stands in for theirs."""
    shutil.copytree(folders[1], tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer_config.json"
    jinja = "{{ bos_token }}" + CHATML.jinja
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<|endoftext|>", "chat_template": jinja}))
    (tmp_path / "hf" / "chat_template.jinja").write_text(jinja)
    model = open_chat(tmp_path / "hf").model
    prompt = model.prompt([Turn(Role.USER, "问")])
    assert model.tokenizer.decode(prompt).startswith("<|endoftext|><|im_start|>user")
    messages = [{"role": "user", "content": "问"}]
    (found,) = ask(version, [{"what": "chatted", "folder": str(tmp_path / "hf"), "messages": messages, "count": 1}])
    assert found["direct"] == prompt


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("chat_template.jinja", CHATML.jinja, "<|im_end|>"),
        ("tokenizer_config.json", {"chat_template": CHATML.jinja}, "<|im_end|>"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": HUMAN.jinja}],
             "eos_token": {"content": "<|im_end|>"}},
            "<|im_end|>",
        ),
        ("tokenizer_config.json", {"chat_template": HUMAN.jinja, "eos_token": "<|endoftext|>"}, "<|endoftext|>"),
        ("tokenizer_config.json", {"chat_template": 3}, DataError),
        ("tokenizer_config.json", [], DataError),
        ("chat_template.jinja", "{% for", UsageError),
    ],
)  # fmt: skip
def test_templates_of_other_folders(
    folders: tuple[Path, Path, Path], tmp_path: Path, name: str, content: object, found: object
) -> None:
    for each in folders[1].iterdir():
        if each.name not in ("chat_template.jinja", "tokenizer_config.json"):
            (tmp_path / each.name).symlink_to(each)
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if isinstance(found, str):
        assert find_template(find_model(tmp_path)).stop == found
    else:
        with pytest.raises(found):  # type: ignore[call-overload]
            find_template(find_model(tmp_path))
