"""Fine-tuning from a request to an exit code: own conversations are converted first, and the demo is led through."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megazh.cluster.start import start
from megazh.conversation.encode import template_for
from megazh.conversation.registry import sets_of
from megazh.conversation.template import DEFAULT
from megazh.errors import UsageError
from megazh.finetune.conversion_folder import MANIFEST
from megazh.finetune.convert import Request as Conversion
from megazh.finetune.demo import ANSWER_TOKENS, LONG, SHORT, Questions, prepare
from megazh.finetune.fit import Fitting
from megazh.finetune.own_data import prepare_conversations
from megazh.run.folder import RunFolder
from megazh.tokenizer import Tokenizer
from megazh.training.checks.data import facts
from megazh.training.checks.resume import is_complete
from megazh.training.job import Request, Task
from megazh.training.model_source import find_model
from megazh.training.preflight import name_of, requested_case
from megazh.training.recipe import Recipe, run_recipe
from megazh.training.startup import preparing

if TYPE_CHECKING:
    from megazh.finetune.answers import Answer

EPOCHS = 3.0
"""Epochs of own conversations where nothing else is said."""
_SHOWN = 4  # answers of the demo
_COLUMNS = 48  # of a shown answer


@dataclass(frozen=True)
class OwnData:
    """The user's own conversations."""

    inputs: Sequence[str]
    """Files, folders, globs and registries."""
    template: str = DEFAULT
    encoding: str | None = None


def finetune(request: Request, own: OwnData | None = None, epochs: float | None = None) -> int:
    """Fine-tune; without a recipe, GPUs or own conversations, the demo. Returns the exit code.

    Args:
        request: the request, without `inputs`.
        own: conversations to convert first.
        epochs: length of the run in passes over its data, in place of the recipe's length.

    Raises:
        MegazhError: the request cannot work; nothing was started.
    """
    if own is None and request.recipe is None and request.gpus is None:
        if epochs is not None:
            raise UsageError(f"--epochs {epochs:g}: the demo has a length of its own; set steps=N, or give -i or -c")
        return _demo(request)
    if own is not None:
        request = _with_data(request, own)
        epochs = epochs or (None if _has_length(request) else EPOCHS)
    return start(request if epochs is None else _with_length(request, epochs))


def _has_length(request: Request) -> bool:
    keys = {text.removeprefix("--").partition("=")[0].rpartition(".")[2] for text in request.settings}
    return bool(keys & {"steps", "max_steps", "tokens"})


def _with_length(request: Request, epochs: float) -> Request:
    """The request with the optimizer steps that so many passes over its data take."""
    if _has_length(request):
        raise UsageError(f"--epochs {epochs:g}: steps or tokens are given, too; leave one of them out")
    recipe = requested_case(request).recipe
    data = facts(recipe)
    if data is None:
        return request  # which the start refuses
    tokens, course = epochs * sum(each.training_tokens for each in data.corpora), recipe.course
    fewer = course.steps_within(tokens)
    nearer = min(fewer, fewer + 1, key=lambda steps: abs(course.tokens_before(steps) - tokens))
    steps = max(1, nearer)
    return replace(request, settings=[*request.settings, f"schedule.steps={steps}"])


def _with_data(request: Request, own: OwnData) -> Request:
    """The request with the manifest of own conversations; they are converted, unless that was done before."""
    name = request.run.name if request.run else name_of(own.inputs[0])
    folder = Path("data_index") / name
    manifest = folder / MANIFEST
    if any("data.manifest" in text or text.startswith("manifest=") for text in request.settings):
        raise UsageError("-i makes a manifest of its own, and data.manifest names another; give one of them")
    request = replace(
        request, run=request.run or Path("runs") / name, settings=[f"data.manifest={manifest}", *request.settings]
    )
    if request.dry_run:
        if not manifest.exists():
            _say(f"data: a start converts -i into {folder} first; until then {manifest} is missing")
        return request
    recipe = requested_case(request).recipe
    tokenizer = _base_tokenizer(recipe)
    fitting = Fitting(template_for(tokenizer, own.template), tokenizer, max_tokens=recipe.batch.seq_len)
    conversion = Conversion(sets_of(own.inputs), fitting, folder, seed=recipe.schedule.seed, encoding=own.encoding)
    with preparing():
        prepare_conversations(conversion, _say)
    return request


def _base_tokenizer(recipe: Recipe) -> Tokenizer:
    wanted = recipe.checkpoint.initial_checkpoint
    if wanted is None:
        raise UsageError("checkpoint.initial_checkpoint: missing; name the run or folder of the model to fine-tune")
    try:
        return find_model(Path(wanted)).tokenizer()
    except UsageError as error:
        raise UsageError(f"{error}; train it first, or name another with checkpoint.initial_checkpoint") from None


@dataclass(frozen=True)
class _Stage:
    """A stage of the demo."""

    run: Path
    base: Path
    questions: Questions


_STAGES = {
    Task.NORMAL: _Stage(Path("runs/demo-sft"), Path("runs/demo"), SHORT),
    Task.LONG_CONTEXT: _Stage(Path("runs/demo-long"), Path("runs/demo-sft"), LONG),
}


def _demo(request: Request) -> int:
    """Train the base where it is missing, make questions, fine-tune, and compare answers before and after."""
    stage = _STAGES[request.task]
    request = replace(request, run=request.run or stage.run)
    requested_case(request)  # first: a setting that cannot work is refused before anything is trained
    if not _is_trained(RunFolder(stage.base)):
        _say(f"{stage.base}: the model that this starts from is not there yet; it is trained first")
        earlier = replace(request, run=None, settings=[])
        before_it = request.task is Task.LONG_CONTEXT
        code = _demo(replace(earlier, task=Task.NORMAL)) if before_it else start(replace(earlier, task=Task.PRETRAIN))
        if code or request.dry_run:
            return code
        _say("")
    recipe = requested_case(request).recipe
    if request.dry_run:
        return start(request)
    with preparing():
        tokenizer = RunFolder(stage.base).tokenizer()
        prepare(stage.questions, Path(recipe.data.manifest), tokenizer, recipe.batch.seq_len, _say)
        before = _answers(stage.base, stage, request.device)
        _say(f"{stage.base}: {_right(before)}")
    if code := start(request):
        return code
    assert request.run is not None
    after = _answers(request.run, stage, request.device)
    _say("")
    for first, second in zip(before[:_SHOWN], after[:_SHOWN], strict=True):
        *_, asked, right = first.conversation.turns
        _say(f"question    {asked.text}")
        _say(f"  before    {_shown(first.text)}")
        _say(f"  after     {_shown(second.text)} ({'right' if second.is_right else f'wrong: {right.text}'})")
    _say(f"before      {_right(before)}")
    _say(f"after       {_right(after)}")
    return 0


def _right(answers: "Sequence[Answer]") -> str:
    right = sum(answer.is_right for answer in answers)
    share = right / len(answers)
    return f"{right} of {len(answers)} questions that are not in the training data are answered right ({share:.1%})"


def _is_trained(run: RunFolder) -> bool:
    return run.exists and is_complete(run, run_recipe(run))


def _answers(run: Path, stage: _Stage, device: str | None) -> "list[Answer]":
    from megazh.finetune.answers import answer_all  # they need torch
    from megazh.training.text_model import open_model

    model = open_model(run, device=device)
    return answer_all(model, template_for(model.tokenizer), stage.questions.held_out(), ANSWER_TOKENS)


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _COLUMNS else f"{line[:_COLUMNS]}…"


def _say(line: str) -> None:
    print(line, flush=True)
