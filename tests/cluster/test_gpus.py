"""Choosing GPUs on simulated machines: the descriptions of torch and of the NVIDIA card are replaced."""

from pathlib import Path

import pytest

from megazh.cluster import gpus
from megazh.cluster.cuda import Torch
from megazh.cluster.gpus import choose_devices, nvidia_card, parse_gpu_list
from megazh.errors import UsageError
from megazh.training.job import Devices
from megazh.training.recipe import Device

DESCRIBE_TORCH = gpus.describe_torch  # each test replaces it
CPU_BUILD = Torch("2.13.0+cpu", None, 0)
CUDA_BUILD = Torch("2.13.0", "13.0", 0, "Found no NVIDIA driver on your system")


@pytest.fixture(autouse=True)
def _no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine(monkeypatch, CPU_BUILD)


def machine(monkeypatch: pytest.MonkeyPatch, torch: Torch, card: str = "") -> None:
    """Simulate a machine with this torch, and with an NVIDIA card if `card` names its device file."""
    monkeypatch.setattr(gpus, "describe_torch", lambda: torch)
    monkeypatch.setattr(gpus, "nvidia_card", lambda: card)


@pytest.fixture
def six(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with six GPUs that work."""
    machine(monkeypatch, Torch("2.13.0", "13.0", 6), "/dev/nvidia0")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1,2,3", [1, 2, 3]), ("0-5", [0, 1, 2, 3, 4, 5]), ("5,0-1", [5, 0, 1]), ("3", [3]), (" 1 , 2 ", [1, 2])],
)
def test_lists(text: str, numbers: list[int]) -> None:
    assert parse_gpu_list(text) == numbers


@pytest.mark.parametrize(
    "text", ["", "a", "1,,2", "1,", "-1", "3-1", "1-2-3", "1.5", "0 1", "²", "1" * 30, "1,1", "0-3,2"]
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^-g .*(expected numbers|twice)"):
        parse_gpu_list(text)


@pytest.mark.usefixtures("six")
@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ((None, None, None, 6), "012345"),
        ((None, None, None, 2), "01"),
        ((None, None, None, 8), "012345"),
        ((None, None, None, None), "012345"),
        ((None, None, 3, 6), "012"),
        ((None, "1,2,3", None, 6), "123"),
        (("cuda", "5,4", 2, 6), "54"),
    ],
)
def test_six_gpus(options: tuple[str | None, str | None, int | None, int | None], ids: str) -> None:
    assert choose_devices(*options) == Devices(Device.CUDA, len(ids), tuple(ids))


@pytest.mark.usefixtures("six")
def test_what_contradicts_or_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^-n 3, but -g 1,2 lists 2 GPUs"):
        choose_devices(None, "1,2", 3, 6)
    with pytest.raises(UsageError, match=r"^-g 4,6,7: no GPU 6, 7; there are 0, 1, 2, 3, 4, 5$"):
        choose_devices(None, "4,6,7", None, 6)
    with pytest.raises(UsageError, match=r"^-n 7: there are 6 GPUs"):
        choose_devices(None, None, 7, 6)
    with pytest.raises(UsageError, match="-g 0 and --device cpu"):
        choose_devices("cpu", "0", None, 6)


def test_numbers_count_within_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-8a3f")
    machine(monkeypatch, Torch("2.13.0", "13.0", 3), "/dev/nvidia0")
    chosen = choose_devices(None, "0,2", None, 6)
    assert chosen.ids == ("4", "GPU-8a3f")
    assert "-g 0,2 counts within CUDA_VISIBLE_DEVICES=4,5,GPU-8a3f: GPUs 4,GPU-8a3f" in chosen.note
    assert choose_devices(None, None, None, 6) == Devices(Device.CUDA, 3, ("4", "5", "GPU-8a3f"))
    with pytest.raises(UsageError, match="no GPU 4; there are 0, 1, 2 within CUDA_VISIBLE_DEVICES=4,5"):
        choose_devices(None, "4", None, 6)


def test_the_cpu_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_expected() -> Torch:
        raise AssertionError("torch was described for nothing")

    monkeypatch.setattr(gpus, "describe_torch", not_expected)
    assert choose_devices("cpu", None, 4, 2) == Devices(Device.CPU, 4, None)
    assert choose_devices("cpu", None, None, 2) == Devices(Device.CPU, 2, None)
    assert choose_devices("cpu", None, None, None) == Devices(Device.CPU, 1, None)


@pytest.mark.parametrize(
    ("torch", "card", "visible", "reason"),
    [
        (CPU_BUILD, "", None, "this torch (2.13.0+cpu) is built without CUDA"),
        (CPU_BUILD, "/dev/nvidia0", None, "would not use the NVIDIA card in this machine"),
        (CUDA_BUILD, "", None, "no NVIDIA GPU is in this machine"),
        (CUDA_BUILD, "/dev/nvidia0", "", "CUDA_VISIBLE_DEVICES= hides all GPUs"),
        (CUDA_BUILD, "/dev/nvidia0", "-1", "CUDA_VISIBLE_DEVICES=-1 hides all GPUs"),
    ],
)
def test_the_cpu_where_there_is_nothing_else_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, torch: Torch, card: str, visible: str | None, reason: str
) -> None:
    machine(monkeypatch, torch, card)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    chosen = choose_devices(None, None, None, 2)
    assert (chosen.device, chosen.ranks, chosen.ids) == ("cpu", 2, None)
    assert reason in chosen.note
    assert "\n" not in chosen.note


@pytest.mark.parametrize(("device", "numbers"), [(None, None), ("cuda", None), (None, "0")])
def test_a_card_without_a_working_driver_is_never_passed_over(
    monkeypatch: pytest.MonkeyPatch, device: str | None, numbers: str | None
) -> None:
    machine(monkeypatch, CUDA_BUILD, "/dev/nvidia0")
    with pytest.raises(UsageError, match=r"Found no NVIDIA driver.*nvidia-smi.*CUDA 13.0.*--device cpu") as error:
        choose_devices(device, numbers, None, 6)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("device", "numbers", "option"), [("cuda", None, "--device cuda"), (None, "0", "-g 0")])
def test_a_gpu_that_was_asked_for_is_not_replaced_by_the_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str | None, numbers: str | None, option: str
) -> None:
    with pytest.raises(UsageError, match=f"^{option}: .*without CUDA; install one"):
        choose_devices(device, numbers, None, 6)
    machine(monkeypatch, CUDA_BUILD)
    with pytest.raises(UsageError, match=f"^{option}: no NVIDIA GPU is in this machine"):
        choose_devices(device, numbers, None, 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match=f"^{option}: CUDA_VISIBLE_DEVICES= hides all"):
        choose_devices(device, numbers, None, 6)


def test_cards_are_found_without_a_driver(tmp_path: Path) -> None:
    assert nvidia_card(tmp_path) == ""
    devices = [("0", "0x1002", "0x030000"), ("1", "0x10de", "0x040300"), ("2", "0x10de", "0x030200")]
    for name, vendor, device_class in devices:
        folder = tmp_path / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{device_class}\n")
        assert bool(nvidia_card(tmp_path)) == (name == "2"), "another maker's card, the card's sound, the card"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert nvidia_card(tmp_path).endswith("devices/2")
    (tmp_path / "dev/nvidia3").touch()
    assert nvidia_card(tmp_path).endswith("dev/nvidia3")


def test_torch_is_described_as_it_is() -> None:
    import torch

    described = DESCRIBE_TORCH()
    assert (described.version, described.cuda) == (torch.__version__, torch.version.cuda)
    assert (described.gpus > 0) == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("torch", "visible", "reason"),
    [
        (CPU_BUILD, None, "this torch (2.13.0+cpu) is built without CUDA"),
        (CUDA_BUILD, None, "no NVIDIA GPU is in this machine"),
        (CUDA_BUILD, "NoDevFiles", "CUDA_VISIBLE_DEVICES=NoDevFiles hides all GPUs"),
    ],
)
@pytest.mark.parametrize("slurm", [False, True])
def test_a_recipe_for_gpus_does_not_fall_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, torch: Torch, visible: str | None, reason: str, slurm: bool
) -> None:
    machine(monkeypatch, torch)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    for elsewhere in (False, True):  # a dry run refuses as well, unless GPUs are named
        with pytest.raises(UsageError) as refusal:
            choose_devices(None, None, None, 6, cpu_may_stand_in=False, elsewhere=elsewhere)
        line = str(refusal.value)
        assert line.startswith(f"no GPU to compute on: {reason}; ")
        assert "give --device cpu" in line
        assert ("submit the Slurm job with GPUs (--gres=gpu:N)" in line) == slurm
    assert choose_devices("cpu", None, None, 6, cpu_may_stand_in=False).device is Device.CPU


@pytest.mark.parametrize("options", [("cuda", None, None), (None, "0", None)])
def test_a_slurm_job_without_gpus_is_told_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str | None, str | None, int | None]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for card in ("", "/dev/nvidia0"):
        machine(monkeypatch, CUDA_BUILD, card)
        with pytest.raises(UsageError, match=r"submit the Slurm job with GPUs \(--gres=gpu:N\)"):
            choose_devices(*options, 6)


@pytest.mark.parametrize("card", ["", "/dev/nvidia0"])
@pytest.mark.parametrize(
    ("options", "ids"),
    [((None, "2-4", None, 6), "234"), ((None, None, 4, 6), "0123"), (("cuda", None, None, 6), "012345")],
)
def test_a_dry_run_on_a_login_node_takes_gpus_as_given(
    monkeypatch: pytest.MonkeyPatch, card: str, options: tuple[str | None, str | None, int | None, int], ids: str
) -> None:
    machine(monkeypatch, CUDA_BUILD, card)
    chosen = choose_devices(*options, cpu_may_stand_in=False, elsewhere=True)
    assert (chosen.device, chosen.ranks, chosen.ids, chosen.memory) == (Device.CUDA, len(ids), tuple(ids), None)
    assert chosen.note.startswith("this machine has no GPU for torch; ")
    assert chosen.note.endswith(" is taken as given, for another machine")
    with pytest.raises(UsageError, match="is listed twice"):
        choose_devices(None, "1,1", None, 6, elsewhere=True)


def test_the_smallest_of_the_chosen_gpus_limits_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, Torch("2.13.0", "13.0", 3, "", (24, 80, 40)), "/dev/nvidia0")
    assert choose_devices(None, None, None, None).memory == 24
    assert choose_devices(None, "1,2", None, None).memory == 40
    assert choose_devices(None, "1", None, None).memory == 80
    machine(monkeypatch, Torch("2.13.0", "13.0", 3), "/dev/nvidia0")
    assert choose_devices(None, None, None, None).memory is None, "the driver does not say"


@pytest.mark.usefixtures("six")
@pytest.mark.parametrize(("gpus", "count", "ids"), [(None, 8, "012345"), (None, 4, "0123"), ("1,7,5", None, "15")])
def test_where_fewer_will_do_those_that_are_there_are_taken(gpus: str | None, count: int | None, ids: str) -> None:
    assert choose_devices(None, gpus, count, None, fewer_will_do=True).ids == tuple(ids)
