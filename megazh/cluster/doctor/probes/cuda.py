"""The GPUs as torch sees them: names, memory, peer access, and the version of NCCL."""

from megazh.cluster.doctor.probe import Report


def probe(report: Report) -> None:
    """Report versions; then each GPU; then `peers`, whether each GPU (row) can access each other one."""
    import torch

    versions = {"cuda": torch.version.cuda or ""}
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    report({"versions": versions, "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0})
    if not torch.cuda.is_available():
        return
    number = torch.cuda.device_count()
    for gpu in range(number):
        report({"begin": f"GPU {gpu}"})
        properties = torch.cuda.get_device_properties(gpu)
        free, total = torch.cuda.mem_get_info(gpu)
        ones = torch.ones(1 << 20, device=f"cuda:{gpu}")
        report(
            {
                "gpu": gpu,
                "name": properties.name,
                "uuid": str(getattr(properties, "uuid", "")),
                "total": total,
                "free": free,
                "sum": float(ones.sum()),
            }
        )
    peers = [
        [first == second or torch.cuda.can_device_access_peer(first, second) for second in range(number)]
        for first in range(number)
    ]
    report({"peers": peers})
