"""The output of nvidia-smi: fields of each GPU, processes, NVLink; checked, since drivers differ in it."""

import re
import shutil
from typing import NamedTuple

from megazh.cluster.doctor.child import run

_SECONDS = 20.0
FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "pci.bus_id",
    "memory.total",
    "memory.used",
    "memory.free",
    "pcie.link.gen.max",
    "pcie.link.width.max",
    "power.limit",
    "power.default_limit",
    "power.max_limit",
    "clocks.max.sm",
    "temperature.gpu",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "mig.mode.current",
    "compute_mode",
)
LOAD_FIELDS = (
    "pcie.link.gen.current",
    "pcie.link.width.current",
    "clocks.sm",
    "temperature.gpu",
    "power.draw",
    "clocks_throttle_reasons.active",
    "clocks_event_reasons.active",  # its name in later drivers
)
"""Fields that count while the GPU is busy: an idle one lowers its link and its clocks."""

_UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field')
_NOTHING = ("[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "[GPU requires reset]", "[Insufficient Permissions]")
_LINK = re.compile(r"\s*Link \d+: ([\d.]+) GB/s")
_OF_GPU = re.compile(r"GPU (\d+):")


class Process(NamedTuple):
    """A process that computes on a GPU."""

    uuid: str
    pid: str
    name: str
    mib: float | None


class Gpu:
    """Fields of one GPU.

    Args:
        values: text of each field.
    """

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values

    def text(self, field: str) -> str:
        """The text of a field; empty where the driver or the card does not have it."""
        value = self._values.get(field, "").strip()
        return "" if value in _NOTHING or value.startswith("[") else value

    def number(self, field: str) -> float | None:
        """The number in a field, without its unit; None where there is none."""
        match = re.match(r"[-+]?\d+(\.\d+)?", self.text(field))
        return float(match[0]) if match else None


def why_missing() -> str:
    """The reason why nvidia-smi cannot be asked; empty if it can."""
    return "" if shutil.which("nvidia-smi") else "nvidia-smi is not installed"


def query(fields: tuple[str, ...] = FIELDS, seconds: float = _SECONDS) -> tuple[list[Gpu], str]:
    """The fields of each GPU, without those that this driver does not know; and the reason where it fails."""
    known, output, why = _asked(fields, seconds)
    return ([], why) if why else (parse(output, known), "")


def known_fields(fields: tuple[str, ...], seconds: float = _SECONDS) -> list[str]:
    """Those of the fields that this driver knows; empty where it does not answer."""
    known, _, why = _asked(fields, seconds)
    return [] if why else known


def _asked(fields: tuple[str, ...], seconds: float) -> tuple[list[str], str, str]:
    """The fields that the driver knows, its output for them, and the reason where it fails."""
    known = list(fields)
    while known:
        try:
            ended = run(command(known), seconds)
        except OSError as error:
            return known, "", f"nvidia-smi: {error.strerror or error}"
        if ended.code == 0:
            return known, ended.output, ""
        unknown = _UNKNOWN_FIELD.search(ended.output + ended.errors)
        if ended.code is None or unknown is None or unknown[1] not in known:
            said = next((line for line in ended.output.splitlines() if line.strip()), "")
            return known, "", f"nvidia-smi: {said or ended.failure}"
        known.remove(unknown[1])
    return [], "", "nvidia-smi knows none of the fields"


def command(fields: list[str] | tuple[str, ...], uuid: str = "") -> list[str]:
    """The command that prints these fields of all GPUs, or of one."""
    words = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    return [*words, f"--id={uuid}"] if uuid else words


def parse(output: str, fields: list[str] | tuple[str, ...]) -> list[Gpu]:
    """The GPUs of CSV without a header; lines with another number of fields (warnings of the driver) are left out."""
    found = []
    for line in output.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(fields):
            found.append(Gpu(dict(zip(fields, values, strict=True))))
    return found


def processes(seconds: float = _SECONDS) -> list[Process]:
    """The processes that compute on GPUs, as far as nvidia-smi sees them."""
    words = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory"]
    try:
        ended = run([*words, "--format=csv,noheader,nounits"], seconds)
    except OSError:
        return []
    return parse_processes(ended.output) if ended.code == 0 else []


def parse_processes(output: str) -> list[Process]:
    """The processes of CSV without a header; a name may contain commas."""
    found = []
    for line in output.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) >= 4 and values[0].startswith(("GPU-", "MIG-")) and values[1].isdigit():
            mib = float(values[-1]) if values[-1].replace(".", "", 1).isdigit() else None
            found.append(Process(values[0], values[1], ", ".join(values[2:-1]), mib))
    return found


def nvlink_gb_s(seconds: float = _SECONDS) -> dict[int, float]:
    """GB/s in each direction over all NVLinks of each GPU by nvidia-smi's number; empty where there are none."""
    try:
        ended = run(["nvidia-smi", "nvlink", "--status"], seconds)
    except OSError:
        return {}
    return parse_nvlink(ended.output) if ended.code == 0 else {}


def parse_nvlink(output: str) -> dict[int, float]:
    """Sum the rates of the active links of each GPU in the output of `nvidia-smi nvlink --status`."""
    found: dict[int, float] = {}
    gpu = None
    for line in output.splitlines():
        if match := _OF_GPU.match(line):
            gpu = int(match[1])
        elif gpu is not None and (match := _LINK.match(line)):
            found[gpu] = found.get(gpu, 0.0) + float(match[1])
    return found


def topology(seconds: float = _SECONDS) -> dict[tuple[int, int], str]:
    """The type of the link between each two GPUs; see `parse_topology`."""
    try:
        ended = run(["nvidia-smi", "topo", "-m"], seconds)
    except OSError:
        return {}
    return parse_topology(ended.output) if ended.code == 0 else {}


def parse_topology(output: str) -> dict[tuple[int, int], str]:
    """The cells of `nvidia-smi topo -m` between GPUs by their numbers: NV18, PIX, PXB, PHB, NODE, SYS."""
    output = re.sub(r"\x1b\[[0-9;]*m", "", output)  # its header is underlined
    rows = [line.split() for line in output.splitlines()]
    header = next((row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" not in row), None)
    if header is None:
        return {}
    columns = [int(name[3:]) for name in header if re.fullmatch(r"GPU\d+", name)]
    found = {}
    for row in rows:
        if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row and len(row) > len(columns):
            own = int(row[0][3:])
            for other, cell in zip(columns, row[1:], strict=False):
                if re.fullmatch(r"NV\d+|PIX|PXB|PHB|NODE|SYS", cell):
                    found[own, other] = cell
    return found
