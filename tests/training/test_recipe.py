"""Recipes: those that come with megazh, settings on top, refusals, and the round trip through a file."""

from pathlib import Path
from typing import Any

import pytest
from recipes import make_recipe

from megazh.errors import SeveralErrors, UsageError
from megazh.training.layout import make_layout
from megazh.training.recipe import MAY_CHANGE, Recipe, differing_keys, keys, load_recipe
from megazh.training.recipe_files import recipe_names, recipe_path

NAMES = recipe_names()


def write(folder: Path, text: str = "", name: str = "own.yaml") -> Path:
    path = folder / name
    path.write_text(
        "model: {vocab_size: 64, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 8}\n"
        "data: {manifest: m.yaml}\nbatch: {seq_len: 16, micro_batch_size: 2, global_batch_size: 8}\n"
        "optimizer: {learning_rate: 1e-3}\n" + text,
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("name", NAMES)
def test_recipes_that_come_along_work(name: str) -> None:
    recipe = load_recipe(recipe_path(name))
    layout = make_layout(recipe, recipe.parallel.num_gpus or 6)
    assert layout.micro_batches >= 1
    assert recipe.course.steps >= 1


@pytest.mark.parametrize(
    ("name", "tokens", "layout", "steps"),
    [
        ("qwen0.5b_6x3090", 786_432, (6, 2, 3, 8, 32), 38_147),
        ("qwen0.5b_6x3090_dp", 786_432, (6, 1, 6, 8, 16), 38_147),
        ("microstories_44m", 262_144, (1, 1, 1, 32, 16), 5_723),
        ("llama_28x704", 61_440, (1, 1, 1, 16, 20), 14_649),
        ("minillm_1.4b", 245_760, (6, 2, 3, 8, 20), 32_553),
        ("longlora_qwen0.5b_6x3090", 393_216, (6, 1, 6, 1, 8), 1000),
    ],
)
def test_numbers_of_the_recipes(name: str, tokens: int, layout: tuple[int, ...], steps: int) -> None:
    recipe = load_recipe(recipe_path(name))
    found = make_layout(recipe, layout[0])
    assert recipe.course.tokens(0) == tokens
    assert (found.ranks, found.stages, found.replicas, found.micro_batch_size, found.micro_batches) == layout
    assert recipe.course.steps == steps


def test_settings_of_the_half_billion_run() -> None:
    recipe = load_recipe(recipe_path("qwen0.5b_6x3090"))
    assert (recipe.optimizer.learning_rate, recipe.optimizer.betas, recipe.optimizer.weight_decay) == (
        5e-4,
        [0.9, 0.95],
        0.1,
    )
    assert (recipe.model.rope_theta, recipe.model.norm_eps, recipe.model.qkv_bias) == (1e6, 1e-6, True)
    assert (recipe.precision.dtype, recipe.precision.grad_accum_dtype, recipe.schedule.tokens) == (
        "bf16",
        None,
        30_000_000_000,
    )


def test_settings_of_longlora() -> None:
    """Learning rate, weight decay, warm-up and interpolation as in LongLoRA; attention that is not approximated."""
    recipe = load_recipe(recipe_path("longlora_qwen0.5b_6x3090"))
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay, recipe.schedule.warmup) == (2e-5, 0, 20)
    rates = [recipe.course.rate(step) for step in (20, 500, 999)]
    assert rates == pytest.approx([2e-5] * 3)
    assert (recipe.batch.seq_len, recipe.attention_group) == (8192, None)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (8, 16, ["q", "k", "v", "o"])
    assert (recipe.lora.dropout, recipe.lora.train_embed_norm) == (0, True)
    scaling = recipe.model.rope_scaling
    assert scaling is not None
    assert (scaling.type, scaling.factor * (scaling.original_max_position_embeddings or 0)) == ("linear", 8192)
    assert recipe.model.model_copy(update={"rope_scaling": None}) == load_recipe(recipe_path("qwen0.5b_6x3090")).model


@pytest.mark.parametrize("name", NAMES)
def test_written_and_read_back_it_is_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path(name), ["stage_bounds=[0, 2, 5]"] if name == "demo" else [])
    path = tmp_path / "config.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert load_recipe(path).to_yaml() == recipe.to_yaml()


def test_defaults_of_one_recipe_are_not_those_of_another() -> None:
    first, second = make_recipe(), make_recipe()
    assert (first.optimizer.betas, first.evaluation.sample_prompts) == ([0.9, 0.95], ["从前，"])
    assert first.optimizer.betas is not second.optimizer.betas
    assert first.evaluation.sample_prompts is not second.evaluation.sample_prompts


def test_tokens_and_steps_replace_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, "schedule: {tokens: 1.5M}\n")
    assert load_recipe(path).course.steps == -(-1_500_000 // 128)
    for setting in ("steps=7", "--steps=7"):
        recipe = load_recipe(path, [setting])
        assert (recipe.schedule.tokens, recipe.course.steps) == (None, 7)
    recipe = load_recipe(write(tmp_path, "schedule: {steps: 9}\n"), ["tokens=1k"])
    assert (recipe.schedule.steps, recipe.schedule.tokens, recipe.course.steps) == (None, 1000, 8)
    for settings in (["tokens=1k", "steps=7"], ["steps=null"]):
        with pytest.raises(UsageError, match=r"one of schedule\.tokens and schedule\.steps"):
            load_recipe(path, settings)


def test_settings_reach_the_model(tmp_path: Path) -> None:
    path = write(tmp_path, "schedule: {steps: 9}\n")
    settings = ["model.num_hidden_layers=5", "model.rope_scaling={type: linear, factor: 2}", "betas=[0.8, 0.9]"]
    recipe = load_recipe(path, [*settings, "dtype=fp16", "data.packing=concat", "max_grad_norm=0"])
    assert recipe.model.num_hidden_layers == 5
    assert recipe.model.rope_scaling is not None
    assert recipe.model.rope_scaling.factor == 2
    assert (recipe.optimizer.betas, recipe.precision.dtype, recipe.data.packing) == ([0.8, 0.9], "fp16", "concat")


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("precision=fp16", ["'precision' is a section", "precision.dtype, precision.grad_accum_dtype"]),
        ("micro_batchsize=5", ["'micro_batchsize'", "'batch.micro_batch_size'"]),
        ("micro_batch_size=0", ["'batch.micro_batch_size'", "0"]),
        ("micro_batch_size=2.5", ["'batch.micro_batch_size'", "2.5"]),
        ("dtype=bf61", ["'precision.dtype'", "'bf61'", "auto, fp32, bf16, fp16"]),
        ("betas=[0.9]", ["'optimizer.betas'"]),
        ("betas=[0.9, 1.0]", ["'optimizer.betas[1]'", "1.0"]),
        ("learning_rate=-1", ["'optimizer.learning_rate'", "-1"]),
        ("learning_rate=.nan", ["'optimizer.learning_rate'"]),
        ("tokens=30X", ["'schedule.tokens'", "30X"]),
        ("tokens=0", ["'schedule.tokens'", "0"]),
        ("seq_len=1", ["'batch.seq_len'", "1"]),
        ("stage_bounds=[0, 2]", ["stage_bounds [0, 2]", "0 to 4", "2 blocks"]),
        ("stage_bounds=[0, 3, 2, 4]", ["stage_bounds", "rising"]),
        ("stage_bounds=[1, 4]", ["stage_bounds", "0 to 4"]),
        ("stage_bounds=[]", ["stage_bounds"]),
        ("stage_bounds=[0, 2, 2, 4]", ["stage_bounds", "rising"]),
        ("data.max_docs=1", ["'data.max_docs'", "1"]),
        ("zero_stage=4", ["'parallel.zero_stage'", "4"]),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, setting: str, parts: list[str]) -> None:
    path = write(tmp_path, "schedule: {steps: 9}\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(path, [setting])
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_unknown_keys_and_wrong_values_are_refused_together() -> None:
    """A key that is unknown may be the one that a check of several keys misses: such checks wait."""
    with pytest.raises(SeveralErrors) as refusal:
        load_recipe(recipe_path("demo"), ["foo=1", "spike=x", "steps=null", "batch"])
    lines = [str(error) for error in refusal.value.errors]
    starts = ["unknown key 'foo'", "'batch': expected key=value", "command line: key 'guard.spike': expected one of"]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 3, lines


@pytest.mark.parametrize("bounds", [[0, 4], [0, 1, 4], [0, 1, 2, 3, 4]])
def test_bounds_by_hand(bounds: list[int]) -> None:
    assert make_recipe(stage_bounds=bounds).parallel.stage_bounds == bounds


@pytest.mark.parametrize(("changes", "steps"), [({"tokens": 128}, 1), ({"tokens": 129}, 2), ({"steps": 3}, 3)])
def test_steps_are_rounded_up(changes: dict[str, Any], steps: int) -> None:
    recipe: Recipe = make_recipe(**{"steps": None, **changes})
    assert (recipe.course.tokens(0), recipe.course.steps) == (128, steps)


def test_every_key_has_a_docstring_and_a_last_name_of_its_own() -> None:
    names = [key for key, _ in keys()]
    assert all(field.description for _, field in keys())
    last = [name.rpartition(".")[2] for name in names]
    twice = {name for name in last if last.count(name) > 1}
    assert twice == {"batch"}, "the last name is enough on the command line; batch is the section, not schedule.batch"


def test_whether_a_key_may_change_is_said_at_its_field() -> None:
    free = {key for key, field in keys() if MAY_CHANGE in field.metadata}
    assert {"schedule.steps", "optimizer.learning_rate", "parallel.device", "evaluation.sample_prompts"} <= free
    assert {"parallel.num_gpus", "parallel.pipe_parallel_size", "parallel.stage_bounds"} <= free
    assert not free & {"model.hidden_size", "schedule.seed", "batch.global_batch_size", "precision.dtype"}
    before = make_recipe()
    assert list(differing_keys(before, make_recipe(steps=20, num_gpus=3))) == [
        ("schedule.steps", 10, 20, True),
        ("parallel.num_gpus", None, 3, True),
    ]
    changed = make_recipe(model={"hidden_size": 64}, seed=7)
    fixed = [("model.hidden_size", 32, 64, False), ("schedule.seed", 42, 7, False)]
    assert list(differing_keys(before, changed)) == fixed


@pytest.mark.parametrize(
    ("key", "candidates"),
    [
        ("lr", "'optimizer.learning_rate' or 'schedule.min_lr_ratio'"),
        ("optimizer.lr", "'optimizer.learning_rate' or 'schedule.min_lr_ratio'"),
        ("LEARNING_RATE", "'optimizer.learning_rate'"),
        ("lora.lr", "'optimizer.learning_rate' or 'schedule.min_lr_ratio'"),
        ("rope", "'model.rope_theta' or 'model.rope_scaling'"),
    ],
)
def test_an_unknown_key_on_the_command_line_names_the_candidates(tmp_path: Path, key: str, candidates: str) -> None:
    with pytest.raises(UsageError) as refusal:
        load_recipe(write(tmp_path, "schedule: {steps: 9}\n"), [f"{key}=1"])
    assert str(refusal.value) == f"unknown key '{key}'; did you mean {candidates}?"


def test_an_error_about_several_keys_names_the_places_of_those(tmp_path: Path) -> None:
    path = write(tmp_path, "schedule: {steps: 9}\n")
    with pytest.raises(UsageError, match=r"^command line: give one of schedule\.tokens and"):
        load_recipe(path, ["steps=3", "tokens=5M"])
    with pytest.raises(UsageError, match=r"^.*own\.yaml:\d+, command line: .*hidden_size 32 is not divisible"):
        load_recipe(path, ["num_attention_heads=5"])
    with pytest.raises(UsageError, match=r"^command line: stage_bounds \[0, 9\]: expected"):
        load_recipe(path, ["stage_bounds=[0, 9]"])


def test_a_section_without_keys_changes_nothing(tmp_path: Path) -> None:
    plain = load_recipe(write(tmp_path, "schedule: {steps: 9}\n"))
    assert load_recipe(write(tmp_path, "schedule: {steps: 9}\nparallel:\nlogging:\n")) == plain
    with pytest.raises(UsageError, match="key 'parallel': expected a mapping of its keys, found 'two'"):
        load_recipe(write(tmp_path, "schedule: {steps: 9}\nparallel: two\n"))


def test_a_key_of_another_section_is_named_with_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, "schedule: {steps: 9}\nwarmup: 3\n")
    with pytest.raises(UsageError, match=r"own\.yaml:6: unknown key 'warmup'; did you mean 'schedule\.warmup'\?"):
        load_recipe(path)
    path = write(tmp_path, "schedule: {steps: 9}\nparallel: {gpus: 3}\n")
    with pytest.raises(UsageError, match=r"unknown key 'parallel\.gpus'; did you mean 'parallel\.num_gpus'\?"):
        load_recipe(path)


def test_all_keys_that_are_wrong_are_named_at_once_each_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "include: _pretrain.yaml\nmodel: {hidden_siz: 32}\nbatch: {micro_batch_size: x}\nprecision: {dtype: bf17}\n"
    )
    with pytest.raises(SeveralErrors) as refusal:
        load_recipe(tmp_path / "mine.yaml", ["weight_decay=-1"])
    starts = [":2: unknown key 'model.hidden_siz'", ":3: key 'batch.micro_batch_size'", ":4: key 'precision.dtype'"]
    lines = sorted(str(error).removeprefix(f"{tmp_path}/mine.yaml") for error in refusal.value.errors)
    for line, beginning in zip(lines, [*starts, "command line: key 'optimizer.weight_decay'"], strict=True):
        assert line.startswith(beginning)


def test_groups_of_attention_need_an_even_number_of_kv_heads_and_of_tokens() -> None:
    assert make_recipe(pattern="s2").attention_group == 2048
    assert make_recipe(group_tokens=64).attention_group is None
    with pytest.raises(UsageError, match=r"attention\.pattern=s2 .*num_key_value_heads=1, an odd number; set .*=full"):
        make_recipe(pattern="s2", model={"num_key_value_heads": 1})
    with pytest.raises(UsageError, match=r"attention\.group_tokens"):
        make_recipe(pattern="s2", group_tokens=7)


def test_groups_count_in_the_operations() -> None:
    full, grouped = make_recipe(seq_len=64), make_recipe(seq_len=64, pattern="s2", group_tokens=16)
    assert grouped.flops_per_token.block < full.flops_per_token.block
    assert not [marked for key, *_, marked in differing_keys(full, grouped) if marked], "fixed on resume"
    assert len(list(differing_keys(full, grouped))) == 2
