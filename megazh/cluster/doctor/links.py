"""The links of the GPUs: PCIe under load, peer access, copies, send and receive, all-reduce, beside what they carry."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from megazh.cluster.doctor import smi
from megazh.cluster.doctor.child import Deadline, Ended, probe, run
from megazh.cluster.doctor.gpus import Cuda, check_under_load, smi_of
from megazh.cluster.doctor.report import Found, Pair, Verdict
from megazh.cluster.doctor.smi import Gpu

_PCIE_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""GB/s of a lane in each direction by PCIe generation (PCI-SIG; after encoding)."""

_PCIE_SHARE = 0.6
_PEER_SHARE = 0.5
_NVLINK_SHARE = 0.15
"""Shares of what a link carries below which a measured copy is suspicious. Tensors of 64 MiB do not fill NVLink between
two GPUs; less than a seventh of it is what PCIe carries."""

_MUCH_FASTER = 2.0
"""Factor by which copies by peer access have to be faster than NCCL without it for a remark."""

_COPY_SECONDS, _SECONDS_PER_COPY = 60.0, 2.0
_PAIR_SECONDS, _SECONDS_PER_PAIR = 75.0, 4.0
_PAIR_BYTES = 64 << 20
_NCCL_SECONDS = 30
_DISABLED = "NCCL_P2P_DISABLE"


class Expected(NamedTuple):
    """What the link between two GPUs should carry."""

    gb_s: float | None
    """GB/s in each direction; None where nothing says so."""
    least: float
    """GB/s below which something is wrong; 0 where that is unknown."""
    name: str
    """Such as `NVLink (NV18)` or `PCIe 4.0 x16`."""


def pcie_gb_s(gpu: Gpu | None) -> float | None:
    """GB/s that the PCIe link of a GPU carries at its best in each direction; None where nvidia-smi does not know."""
    if gpu is None:
        return None
    generation, width = gpu.number("pcie.link.gen.max"), gpu.number("pcie.link.width.max")
    lane = _PCIE_LANE.get(int(generation or 0))
    return lane * width if lane and width else None


def check(found: Found, cuda: Cuda, gpus: list[Gpu], deadline: Deadline) -> None:
    """Measure the links of all GPUs.

    Args:
        found: gets findings, settings and pairs.
        cuda: the GPUs by torch.
        gpus: the GPUs by nvidia-smi.
        deadline: time that is left.
    """
    number = len(cuda.gpus)
    if not number:
        found.add("links", Verdict.SKIPPED, "no GPU")
        return
    of_torch = [smi_of(each, gpus) for each in cuda.gpus]
    fields = smi.known_fields(smi.LOAD_FIELDS) if any(of_torch) else []
    copied, copies_end = _copies(cuda, of_torch, fields, deadline)
    _judge_host_copies(found, of_torch, fields, copied)
    if number > 1:
        _judge_peers(found, cuda, _expected(of_torch, False), copied)
    if copies_end.failure:
        begun = [each["begin"] for each in copied if "begin" in each]
        _add_failure(found, f"{begun[-1] if begun else 'copies'}: {copies_end.failure}", deadline)
        if begun and "from GPU" in begun[-1] and deadline.left(1):
            found.use(f"export {_DISABLED}=1", "a copy from GPU to GPU hangs or fails here")
    if number == 1:
        found.add("links", Verdict.SKIPPED, "send, receive and all-reduce: there is one GPU")
    elif not deadline.left(1):
        found.add("links", Verdict.SKIPPED, "send, receive and all-reduce: no time is left; give a larger --limit")
    else:
        _check_pairs(found, number, _expected(of_torch, _is_disabled()), copied, deadline)


def _add_failure(found: Found, text: str, deadline: Deadline) -> None:
    """Add a measurement that failed or hung; one that the limit of the whole examination has ended proves nothing."""
    if deadline.left(1):
        found.add("links", Verdict.BAD, text, f"see docs/cluster.md, When NCCL hangs. {_iommu_remedy()}")
    else:
        found.add("links", Verdict.SKIPPED, f"{text}; no time is left: give a larger --limit")


def _copies(
    cuda: Cuda, of_torch: list[Gpu | None], fields: list[str], deadline: Deadline
) -> tuple[list[dict[str, Any]], Ended]:
    number = len(cuda.gpus)
    looks = {
        str(number): smi.command(fields, gpu.text("uuid"))
        for number, gpu in enumerate(of_torch)
        if gpu is not None and fields
    }
    seconds = deadline.left(_COPY_SECONDS + _SECONDS_PER_COPY * number * number)
    peers = cuda.peers or [[False] * number] * number
    return probe("copies", {"looks": looks, "peers": peers}, seconds)


def _judge_host_copies(
    found: Found, of_torch: list[Gpu | None], fields: list[str], copied: list[dict[str, Any]]
) -> None:
    for each in copied:
        if "to_gpu" not in each:
            continue
        number, gpu = each["gpu"], of_torch[each["gpu"]]
        under_load = smi.parse(each["under_load"], fields)
        busy = under_load[0] if under_load else None
        if busy is not None:
            check_under_load(found, number, busy, gpu)
        else:
            found.add("gpus", Verdict.SKIPPED, f"GPU {number} under load: nvidia-smi did not answer for it")
        could = pcie_gb_s(gpu)
        beside = f" of {could:.1f} that the link carries" if could else ""
        text = f"GPU {number}: {each['to_gpu']:.1f} GB/s from the host, {each['to_host']:.1f} GB/s to it{beside}"
        link = _pcie_text(busy)
        text += f"; {link} under load" if link else ""
        if busy is not None and gpu is not None and (narrow := _narrower(busy, gpu)):
            remedy = "reseat the card; check riser, slot, and the slot's generation in the BIOS"
            found.add("links", Verdict.WARNING, f"{text}: {narrow}", remedy)
        elif could and min(each["to_gpu"], each["to_host"]) < _PCIE_SHARE * could:
            remedy = "another GPU may share the slot's lanes; bind ranks to the NUMA node of their GPU"
            found.add("links", Verdict.WARNING, f"{text}: slow", remedy)
        else:
            found.add("links", Verdict.OK, text)


def _pcie_text(gpu: Gpu | None) -> str:
    if gpu is None:
        return ""
    generation, width = gpu.number("pcie.link.gen.current"), gpu.number("pcie.link.width.current")
    return f"PCIe {generation:.0f}.0 x{width:.0f}" if generation and width else ""


def _narrower(busy: Gpu, most: Gpu) -> str:
    """How the link is below its best; empty where it is not."""
    parts = []
    for field, name in (("gen", "generation"), ("width", "width")):
        is_now, could_be = busy.number(f"pcie.link.{field}.current"), most.number(f"pcie.link.{field}.max")
        if is_now and could_be and is_now < could_be:
            parts.append(f"{name} {is_now:.0f} of {could_be:.0f}")
    return ", ".join(parts)


def _expected(of_torch: list[Gpu | None], disabled: bool) -> dict[tuple[int, int], Expected]:
    """What the link between each two GPUs, by their numbers in torch, should carry; `disabled`: without peer access."""
    types, nvlink = smi.topology(), smi.nvlink_gb_s()
    found = {}
    for first, one in enumerate(of_torch):
        for second, other in enumerate(of_torch):
            if first == second:
                continue
            places = [int(gpu.number("index") or 0) if gpu is not None else -1 for gpu in (one, other)]
            link = types.get((places[0], places[1]), "")
            rates = [nvlink.get(place, 0.0) for place in places]
            pcie = [rate for rate in (pcie_gb_s(one), pcie_gb_s(other)) if rate]
            if link.startswith("NV") and all(rates) and not disabled:
                found[first, second] = Expected(min(rates), _NVLINK_SHARE * min(rates), f"NVLink ({link})")
            elif len(pcie) == 2:
                name = f"PCIe{f' ({link})' if link and not link.startswith('NV') else ''}"
                found[first, second] = Expected(min(pcie), 0.0, name)
            else:
                found[first, second] = Expected(None, 0.0, link or "unknown link")
    return found


def _judge_peers(
    found: Found, cuda: Cuda, expected: dict[tuple[int, int], Expected], copied: list[dict[str, Any]]
) -> None:
    number = len(cuda.gpus)
    refused = [
        f"{first}-{second}"
        for first in range(number)
        for second in range(first + 1, number)
        if cuda.peers and not (cuda.peers[first][second] and cuda.peers[second][first])
    ]
    if not cuda.peers:
        found.add("links", Verdict.SKIPPED, "peer access: torch did not say")
    elif refused:
        text = f"the driver refuses peer access between GPUs {', '.join(refused)}: they talk through the host's memory"
        remedy = "usual for consumer cards (RTX 3090, 4090) without NVLink; see megazh plan --measured for its price"
        found.add("links", Verdict.WARNING, text, remedy)
    else:
        found.add("links", Verdict.OK, f"peer access between all {number} GPUs")
    for each in copied:
        if "right" not in each:
            continue
        first, second = each["from"], each["to"]
        could = expected[first, second]
        beside = f" of {could.gb_s:.1f} by {could.name}" if could.gb_s else f" ({could.name})"
        text = f"GPU {first} to GPU {second}: a copy at {each['rate']:.1f} GB/s{beside}"
        least = max(could.least, _PEER_SHARE * could.gb_s if could.gb_s and not could.least else 0.0)
        if not each["right"]:
            found.add("links", Verdict.BAD, f"{text} arrives with wrong bytes", _iommu_remedy())
            found.use(f"export {_DISABLED}=1", f"copies between GPU {first} and GPU {second} arrive with wrong bytes")
        elif each["peer"] and each["rate"] < least:
            found.add("links", Verdict.WARNING, f"{text}: slow", _iommu_remedy())
        else:
            found.add("links", Verdict.OK, text)


def _check_pairs(
    found: Found,
    number: int,
    expected: dict[tuple[int, int], Expected],
    copied: list[dict[str, Any]],
    deadline: Deadline,
) -> None:
    reported, ended = _run_pairs(number, deadline)
    pairs = [each for each in reported if "pair" in each]
    for each in pairs:
        first, second = each["pair"]
        could = expected[first, second]
        copies = [one for one in copied if "rate" in one and {one["from"], one["to"]} == {first, second}]
        rates = [one["rate"] for one in copies]
        found.pairs.append(
            Pair(
                first=f"GPU {first}",
                second=f"GPU {second}",
                copy_gb_s=min(rates) if rates else None,
                send_gb_s=each["send"],
                all_reduce_gb_s=each["all_reduce"],
                expected_gb_s=could.gb_s,
            )
        )
        peers_work = bool(copies) and all(one["peer"] and one.get("right") for one in copies)
        _judge_pair(found, each, could, min(rates) if peers_work else 0.0)
    if ended.failure:
        begun = [each["begin"] for each in reported if "begin" in each]
        _add_failure(found, f"NCCL: {begun[-1] if begun else 'its start'}: {ended.failure}", deadline)
        _try_without_peer_access(found, number, deadline)
        return
    for each in reported:
        if "all" in each and not each["right"]:
            found.add("links", Verdict.BAD, "an all-reduce over all GPUs gives wrong sums", _iommu_remedy())
        elif "all" in each:
            text = f"all {each['all']} GPUs: an all-reduce at {each['all_reduce']:.1f} GB/s"
            found.add("links", Verdict.OK, text)


def _run_pairs(
    number: int, deadline: Deadline, environment: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], Ended]:
    pairs = number * (number - 1) // 2
    seconds = deadline.left(_PAIR_SECONDS + _SECONDS_PER_PAIR * pairs)
    arguments = {"backend": "nccl", "size": _PAIR_BYTES, "seconds": _NCCL_SECONDS}
    return probe("pairs", arguments, seconds, number, {"NCCL_DEBUG": "WARN", **(environment or {})})


def _judge_pair(found: Found, pair: dict[str, Any], could: Expected, peer_copy: float) -> None:
    """Judge a pair; `peer_copy`: GB/s of its copies by peer access, 0 where that does not work."""
    first, second = pair["pair"]
    beside = f" of {could.gb_s:.1f} by {could.name}" if could.gb_s else f" ({could.name})"
    through = f", {_DISABLED} set: through the host's memory" if _is_disabled() else ""
    text = (
        f"GPU {first} and GPU {second} by NCCL: send and receive {pair['send']:.1f} GB/s, all-reduce "
        f"{pair['all_reduce']:.1f} GB/s{beside}{through}"
    )
    if not pair["right"]:
        found.add("links", Verdict.BAD, f"{text}: wrong values arrive", _iommu_remedy())
        found.use(f"export {_DISABLED}=1", f"NCCL gets wrong values between GPU {first} and GPU {second}")
    elif could.least and pair["send"] < could.least:
        found.add("links", Verdict.WARNING, f"{text}: slow", "see nvidia-smi nvlink --status and nvidia-smi topo -m")
    elif _is_disabled() and peer_copy > _MUCH_FASTER * pair["send"]:
        remedy = f"unset {_DISABLED}: copies by peer access work here, at {peer_copy:.1f} GB/s"
        found.add("links", Verdict.WARNING, f"{text}: slow", remedy)
    else:
        found.add("links", Verdict.OK, text)


def _try_without_peer_access(found: Found, number: int, deadline: Deadline) -> None:
    """Find out whether NCCL works without peer access, where it failed with it."""
    if _is_disabled():
        return
    if not deadline.left(1):
        found.add("links", Verdict.SKIPPED, f"NCCL with {_DISABLED}=1: no time is left; give a larger --limit")
        return
    reported, ended = _run_pairs(number, deadline, {_DISABLED: "1"})
    rates = [each["send"] for each in reported if "pair" in each]
    if ended.failure or not rates:
        found.add("links", Verdict.BAD, f"NCCL with {_DISABLED}=1 fails, too: {ended.failure}", _SHARED_REMEDY)
        return
    text = f"NCCL with {_DISABLED}=1 works: send and receive at {min(rates):.1f} GB/s or more"
    found.add("links", Verdict.OK, text)
    found.use(f"export {_DISABLED}=1", "NCCL hangs or fails with peer access on this machine, and works without")


_SHARED_REMEDY = "NCCL_DEBUG=INFO shows where it stops; see /dev/shm above, and docs/cluster.md, When NCCL hangs"


def _is_disabled() -> bool:
    """Whether NCCL is told to use no peer access."""
    return os.environ.get(_DISABLED, "") not in ("", "0")


def _iommu_remedy() -> str:
    """What to do where peer access does not work, by what this machine says of IOMMU and ACS."""
    return f"{'; '.join(iommu_hints())}; {_DISABLED}=1 avoids peer access"


def iommu_hints(root: Path = Path("/"), seconds: float = 10.0) -> list[str]:
    """What this machine says of its IOMMU and of PCIe's access control (ACS), both of which break peer access.

    NCCL's user guide, Troubleshooting, "PCI Access Control Services (ACS)".
    """
    hints = []
    try:
        words = (root / "proc/cmdline").read_text(errors="replace").split()
    except OSError:
        words = []
    given = [word for word in words if "iommu" in word]
    folder = root / "sys/class/iommu"
    try:
        on = folder.is_dir() and any(folder.iterdir())
    except OSError:
        on = False
    if on:
        option = f" ({' '.join(given)})" if given else ""
        hints.append(f"the IOMMU is on{option}: switch it off in the BIOS, or boot with iommu=pt")
    else:
        hints.append("no IOMMU is on")
    try:
        listed = run(["lspci", "-vvv"], seconds)
    except OSError:
        hints.append("ACS is unknown (lspci is not installed)")
        return hints
    if "ACSCtl:" not in listed.output:
        hints.append("ACS is unknown (as root: lspci -vvv | grep ACSCtl)")
    elif any("ACSCtl:" in line and "SrcValid+" in line for line in listed.output.splitlines()):
        hints.append("ACS is on, which sends peer copies through the root complex: switch it off in the BIOS")
    return hints
