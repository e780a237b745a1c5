"""Records of a run on the console, in metrics.jsonl and in TensorBoard, over crashes and resumes."""

import io
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megazh.errors import DataError, UsageError, WriteError
from megazh.run import rewind
from megazh.run.metrics import METRICS, VALIDATION, Metrics, StepRecord, read_metrics, sample_of


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "steps": 600,
        "tokens": step * 16_384,
        "loss": 4.0 - step / 100,
        "learning_rate": 4.87e-4,
        "grad_norm": 0.83,
        "step_seconds": 1.46,
        "tokens_per_second": 11_200.0,
        "tokens_per_second_per_gpu": 5600.0,
        "mfu": 0.413,
        "memory_bytes": round(18.2 * 2**30),
        "memory_reserved": 20 * 2**30,
        "data_seconds": 0.002,
        "skipped": False,
        "eta_seconds": 192.0,
    }
    return StepRecord(**{**values, **changes})


def write_run(folder: Path, last: int, first_step: int = 0, loss: float | None = None) -> None:
    """Record the steps up to `last`, with a validation and a sample after every second one."""
    with Metrics(folder, first_step, quiet=False) as metrics:
        for step in range(first_step + 1, last + 1):
            metrics.step(record(step) if loss is None else record(step, loss=loss))
            if step % 2 == 0:
                metrics.validation(step, step * 16_384, 2.5, 1.25, 400)
                metrics.sample(step, "从前", "有一只小猫")


def recorded(folder: Path) -> list[tuple[str, int]]:
    return [(each["kind"], each["step"]) for each in read_metrics(folder)]


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """All points of a scalar in TensorBoard: (step, value)."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    write_run(tmp_path, 4)
    return tmp_path / "metrics.jsonl"


def test_console_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path, 119, quiet=False) as metrics:
        metrics.step(record(120, loss=2.3141))
        metrics.validation(120, 1_966_080, 2.2915, 1.0834, 1400)
    assert capsys.readouterr().out.splitlines() == [
        "step 120/600  loss 2.3141  norm 0.83  11.2k tok/s  MFU 41%  18.2G  ETA 3m12s",
        "validation after step 120 | loss 2.2915 | perplexity 9.89 | 1.0834 bits/byte",
    ]


def test_a_skipped_step_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path, 0, quiet=False) as metrics:
        metrics.step(record(1, skipped=True, grad_norm=math.inf))
    (line,) = _lines(capsys)
    assert "norm inf" in line
    assert line.endswith("skipped: not finite")
    assert len(line) <= 80


def test_sample_is_one_harmless_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path, 0, quiet=False) as metrics:
        metrics.sample(0, "从前", "有一只\n小猫\x1b[2J\ud83d它")
    (line,) = _lines(capsys)
    assert line == "sample after step 0 | 从前 → 有一只 小猫 [2J?它"
    assert read_metrics(tmp_path)[0]["text"] == "有一只\n小猫\x1b[2J?它"


def test_terminal_that_has_no_chinese(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    with Metrics(tmp_path, 0, quiet=False) as metrics:
        metrics.sample(0, "从前", "a cat")
    assert terminal.getvalue() == b"sample after step 0 | ?? ? a cat\n"
    assert read_metrics(tmp_path)[0]["prompt"] == "从前"


def test_lines_lie_in_both_files_before_the_end(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, quiet=False) as metrics:
        for step in (1, 2, 3):
            metrics.step(record(step))
        lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
        assert [step for step, _ in points(tmp_path, "train/loss")] == [1, 2, 3]


def test_reads_back_what_was_recorded(metrics_file: Path) -> None:
    records = read_metrics(metrics_file.parent)
    assert [(each["kind"], each["step"]) for each in records] == [
        ("step", 1),
        ("step", 2),
        ("validation", 2),
        ("sample", 2),
        ("step", 3),
        ("step", 4),
        ("validation", 4),
        ("sample", 4),
    ]
    kind, when = records[0].pop("kind"), records[0]["time"]
    assert kind == "step"
    assert abs(when - time.time()) < 60
    assert StepRecord(**records[0]) == record(1, time=when)
    assert records[2] == {
        "kind": "validation",
        "time": records[2]["time"],
        "step": 2,
        "tokens": 32_768,
        "loss": 2.5,
        "bits_per_byte": 1.25,
        "samples": 400,
        "perplexity": math.exp(2.5),
        "corpora": None,
    }


def test_files_of_earlier_versions_have_no_times(metrics_file: Path) -> None:
    new = {"time", "skipped_so_far"}
    lines = [json.loads(line) for line in metrics_file.read_text("utf-8").splitlines()]
    old = [{key: value for key, value in line.items() if key not in new} for line in lines]
    metrics_file.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert [each["time"] for each in read_metrics(metrics_file.parent)] == [None] * 8
    write_run(metrics_file.parent, 5, first_step=4)
    assert [each["time"] is None for each in read_metrics(metrics_file.parent)] == [True] * 8 + [False]


def test_events_outlive_the_steps_around_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path, 0, quiet=False) as metrics:
        metrics.event(0, "start", "started by 1 x 2 ranks", stages=1, loss=math.inf)
        metrics.step(record(1))
        metrics.event(1, "skip", "step 2\nskipped")
    assert [line for line in _lines(capsys) if " tok/s " not in line] == ["started by 1 x 2 ranks", "step 2 skipped"]
    for lost in (0, 1):  # killed before anything was saved, and after step 1
        with Metrics(tmp_path, lost, quiet=False) as metrics:
            metrics.event(lost, "resume", "once more")
            metrics.step(record(lost + 1))
    assert recorded(tmp_path) == [("event", 0), ("event", 1), ("event", 0), ("step", 1), ("event", 1), ("step", 2)]
    assert [each["name"] for each in read_metrics(tmp_path) if each["kind"] == "event"] == [
        "start", "skip", "resume", "resume",
    ]  # fmt: skip
    assert read_metrics(tmp_path)[0]["details"] == {"stages": 1, "loss": "inf"}
    with Metrics(tmp_path, 1, quiet=False) as metrics:
        assert metrics.evaluated_at(1) == set()


def test_what_is_evaluated_at_a_step(metrics_file: Path) -> None:
    with Metrics(metrics_file.parent, 4, quiet=False) as metrics:
        metrics.event(4, "resume", "once more")
        assert metrics.evaluated_at(4) == {VALIDATION, sample_of("从前")}
        assert metrics.evaluated_at(3) == set()
    with Metrics(metrics_file.parent, 4, quiet=True) as metrics:
        assert metrics.evaluated_at(4) == set()


def test_the_plot_is_drawn_in_the_background(metrics_file: Path) -> None:
    with Metrics(metrics_file.parent, 4, quiet=False) as metrics:
        metrics.draw()
        metrics.draw()  # less than a minute later: nothing
        plot = metrics_file.parent / "loss.png"
        wait_until(plot.exists, 60, "the plot")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_quiet_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path / "run", 0, quiet=True) as metrics:
        metrics.step(record(1))
        metrics.validation(1, 1, 2.0, 1.0, 1)
        metrics.sample(1, "a", "b")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_resume_drops_what_the_checkpoint_does_not_hold(metrics_file: Path) -> None:
    folder = metrics_file.parent
    write_run(folder, 5, first_step=2, loss=1.0)
    assert recorded(folder) == [
        ("step", 1),
        ("step", 2),
        ("validation", 2),
        ("sample", 2),
        ("step", 3),
        ("step", 4),
        ("validation", 4),
        ("sample", 4),
        ("step", 5),
    ]
    losses = [each["loss"] for each in read_metrics(folder) if each["kind"] == "step"]
    assert losses == [3.99, 3.98, 1.0, 1.0, 1.0]


def test_resume_hides_the_lost_points_from_tensorboard(metrics_file: Path) -> None:
    folder = metrics_file.parent
    write_run(folder, 3, first_step=2, loss=1.0)
    assert [step for step, _ in points(folder, "train/loss")] == [1, 2, 3]
    assert points(folder, "train/loss")[2] == (3, 1.0)
    assert points(folder, "validation/loss") == [(2, 2.5)]  # the one after step 4 was lost


def test_resume_after_torn_tensorboard_file(metrics_file: Path) -> None:
    folder = metrics_file.parent
    (events,) = (folder / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-9])
    write_run(folder, 5, first_step=3, loss=1.0)
    assert [step for step, _ in points(folder, "train/loss")] == [1, 2, 3, 4, 5]


def test_new_run_in_a_used_folder_begins_with_nothing(metrics_file: Path) -> None:
    folder = metrics_file.parent
    with Metrics(folder, 0, quiet=False) as metrics:
        metrics.validation(0, 0, 11.9, 4.0, 400)
        metrics.step(record(1, loss=1.0))
    assert recorded(folder) == [("validation", 0), ("step", 1)]
    assert points(folder, "train/loss") == [(1, 1.0)]
    assert [step for step, _ in points(folder, "validation/loss")] == [0]


def test_resume_without_the_file_makes_one(tmp_path: Path) -> None:
    write_run(tmp_path, 3, first_step=2)
    assert recorded(tmp_path) == [("step", 3)]


@pytest.mark.parametrize("lost", [1, 2, 20, 50])
def test_torn_last_line_is_left_out_and_dropped_on_resume(metrics_file: Path, lost: int) -> None:
    whole = recorded(metrics_file.parent)
    metrics_file.write_bytes(metrics_file.read_bytes()[:-lost])
    kept = whole if lost == 1 else whole[:-1]  # if only the line end is lost, the record is complete
    assert recorded(metrics_file.parent) == kept
    write_run(metrics_file.parent, 5, first_step=4)
    assert recorded(metrics_file.parent) == [*kept, ("step", 5)]


@pytest.mark.parametrize(
    "bad",
    [
        b"not json",
        b"",
        b"[1]",
        b'"step"',
        b'{"step": 3}',
        b'{"kind": "other", "step": 3}',
        b'{"kind": ["step"]}',
        b'{"kind": "sample", "step": "x", "prompt": "", "text": ""}',
        b'{"kind": "validation", "step": 3, "loss": 1.0}',
        b"\xff\xfe",
    ],
)
def test_bad_line_is_named(metrics_file: Path, bad: bytes) -> None:
    lines = metrics_file.read_bytes().split(b"\n")
    metrics_file.write_bytes(b"\n".join([*lines[:2], bad, *lines[2:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 3 is no record"):
        read_metrics(metrics_file.parent)
    write_run(metrics_file.parent, 5, first_step=4)
    with pytest.raises(DataError, match="line 3"):
        read_metrics(metrics_file.parent)


@pytest.mark.parametrize("at", [4, 6, 8])
def test_what_a_power_cut_leaves_of_steps_that_are_lost_is_removed(
    metrics_file: Path, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block of zeros in place of lines, or in front of one, behind what was flushed."""
    lines = metrics_file.read_bytes().splitlines(keepends=True)
    metrics_file.write_bytes(b"".join([*lines[:at], b"\0" * 300 + lines[at - 1], *lines[at:]]))
    write_run(metrics_file.parent, 5, first_step=2)
    assert [step for kind, step in recorded(metrics_file.parent) if kind == "step"] == [1, 2, 3, 4, 5]
    assert recorded(metrics_file.parent)[2:4] == [("validation", 2), ("sample", 2)]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == (
        f"warning: {metrics_file}: 1 lines behind step 2 cannot be read, as a power cut may leave them; they are "
        "removed"
    )


def test_the_history_is_not_read_to_go_back(metrics_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines longer than a block, and at each offset in it; nothing before the step is parsed."""
    lines = metrics_file.read_bytes().splitlines()
    for block in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(rewind, "_BLOCK", block)
        metrics_file.write_bytes(b"".join(b"{}\n" * 50 + line + b"\n" for line in lines))
        with Metrics(metrics_file.parent, 4, quiet=False) as metrics:
            assert metrics.evaluated_at(4) == {VALIDATION, sample_of("从前")}
            metrics.go_back(3)
        assert metrics_file.read_bytes() == b"".join(b"{}\n" * 50 + line + b"\n" for line in lines[:5])


def test_bad_last_line_that_is_whole_is_an_error(metrics_file: Path) -> None:
    with open(metrics_file, "ab") as file:
        file.write(b"{}\n")
    with pytest.raises(DataError, match="line 9 "):
        read_metrics(metrics_file.parent)


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_metrics(tmp_path)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    odd = record(
        1,
        loss=math.nan,
        grad_norm=math.inf,
        tokens_per_second=math.inf,
        tokens_per_second_per_gpu=math.nan,
        mfu=math.nan,
        eta_seconds=math.inf,
    )
    with Metrics(tmp_path, 0, quiet=False) as metrics:
        metrics.step(odd)
        metrics.validation(1, 16_384, math.nan, math.inf, 3)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines():
        json.loads(line, parse_constant=refuse)
    step, validation = read_metrics(tmp_path)
    assert math.isnan(step["loss"])
    assert step["grad_norm"] == step["eta_seconds"] == math.inf
    assert math.isnan(validation["loss"])
    ((number, loss),) = points(tmp_path, "train/loss")
    assert number == 1
    assert math.isnan(loss)


def test_tensorboard_has_the_scalars_and_the_text(metrics_file: Path) -> None:
    events = EventAccumulator(str(metrics_file.parent / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "speed/tokens_per_second",
        "speed/tokens_per_second_per_gpu",
        "speed/mfu",
        "memory/allocated_gib",
        "memory/reserved_gib",
        "validation/loss",
        "validation/bits_per_byte",
    } <= set(tags["scalars"])
    assert points(metrics_file.parent, "memory/reserved_gib")[0] == (1, 20.0)
    (tag,) = tags["tensors"]
    (text,) = {event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}
    assert "从前有一只小猫" in text


def test_step_that_is_recorded_already_is_refused(tmp_path: Path) -> None:
    with Metrics(tmp_path, 5, quiet=False) as metrics:
        with pytest.raises(ValueError, match="step 5 comes after step 5"):
            metrics.step(record(5))
        metrics.step(record(6))
        with pytest.raises(ValueError, match="step 6"):
            metrics.step(record(6))
    assert recorded(tmp_path) == [("step", 6)]


def _lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("limit", [1500, 2500, 5000])
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_whole_records(
    tmp_path: Path, limit: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of TensorBoard is full first: that is a warning, and the steps go on."""
    monkeypatch.setenv("MEGAZH_WARNED", "")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Metrics(tmp_path, 0, quiet=False) as metrics:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            number = 1
            while number < 100:
                metrics.step(record(number))
                number += 1
            pytest.fail("nothing was refused")
        except WriteError as error:
            message = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(f"{tmp_path / METRICS}: cannot be written: File too large (")
    assert "'ulimit -f' allows" in message
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path}/tensorboard/events.out.tfevents.")
    assert "File too large; TensorBoard gets no more points of this start; metrics.jsonl has them" in warning
    content = (tmp_path / METRICS).read_bytes()
    assert content.endswith(b"}\n")
    assert [each["step"] for each in read_metrics(tmp_path)] == list(range(1, number))


def test_a_run_without_a_place_for_tensorboard_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAZH_WARNED", "")
    (tmp_path / "tensorboard").touch()
    write_run(tmp_path, 3)
    assert len(read_metrics(tmp_path)) > 3
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_metrics_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / METRICS).mkdir()
    with pytest.raises(WriteError, match=rf"^{tmp_path / METRICS}: cannot be written: Is a directory"):
        Metrics(tmp_path, 0, quiet=False)
