"""Whether Triton's kernels compile on this card and agree with torch."""

from typing import Any

from megazh.cluster.doctor.child import Ended
from megazh.cluster.doctor.report import Found, Verdict


def check(found: Found, reported: list[dict[str, Any]], ended: Ended) -> None:
    """Judge what the probe `kernels` has reported."""
    for each in reported:
        if "why_not" in each:
            text = f"Triton's kernels cannot run: {each['why_not']}; torch computes in their place"
            found.add("kernels", Verdict.WARNING, text, "slower, with the same results; see docs/performance.md")
            return
    kernels = [each for each in reported if "kernel" in each]
    for each in kernels:
        if not each["agree"]:
            text = f"{each['kernel']} differs from torch by {each['difference']:.2g}"
            found.add("kernels", Verdict.BAD, text, "train with kernels=torch, and report this with the versions above")
            found.use("kernels=torch", "a setting of megazh pretrain: Triton's kernels are wrong on this card")
    if ended.failure:
        begun = [each["begin"] for each in reported if "begin" in each]
        text = f"{begun[-1] if begun else 'kernels'}: {ended.failure}"
        remedy = "remove ~/.triton/cache, see that gcc and Python's headers work, or train with kernels=torch"
        found.add("kernels", Verdict.BAD, text, remedy)
    elif kernels and all(each["agree"] for each in kernels):
        largest = max(each["difference"] for each in kernels)
        names = ", ".join(each["kernel"] for each in kernels)
        text = f"{names} compile, and agree with torch (largest difference {largest:.2g})"
        found.add("kernels", Verdict.OK, text)
