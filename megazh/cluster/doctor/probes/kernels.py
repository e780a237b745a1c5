"""Triton's kernels against torch on this card, with the tolerances of their tests."""

from megazh.cluster.doctor.probe import Report


def probe(report: Report, device: str) -> None:
    """Report `why_not`, or the largest difference of each kernel beside what is allowed.

    Args:
        report: as in `megazh.cluster.doctor.probe`.
        device: torch's name of the GPU, such as `cuda:0`; `cpu` in Triton's interpreter.
    """
    import torch
    from torch.nn import functional as F

    from megazh.kernels.support import why_not

    on = torch.device(device)
    if on.type == "cuda":
        torch.cuda.set_device(on)
        if reason := why_not(on, torch.bfloat16):
            report({"why_not": reason})
            return
    from megazh.kernels.attention import document_attention
    from megazh.kernels.cross_entropy import cross_entropy_
    from megazh.kernels.norm import add_norm
    from megazh.kernels.swiglu import swiglu

    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(on)

    def compare(name: str, found: torch.Tensor, wanted: torch.Tensor, relative: float, absolute: float) -> None:
        found, wanted = found.float(), wanted.float()
        difference = (found - wanted).abs()
        agree = bool((difference <= absolute + relative * wanted.abs()).all())  # false also for NaN
        report({"kernel": name, "difference": float(difference.max()), "agree": agree})

    report({"begin": "swiglu"})
    states = random(5, 2 * 1100)
    gate, up = states.chunk(2, -1)
    compare("swiglu", swiglu(states), F.silu(gate) * up, 1e-5, 2e-6)

    report({"begin": "norm"})
    residual, delta, weight = random(37, 1024), random(37, 1024), random(1024)
    total, normed, _ = add_norm(residual, delta, weight, 1e-6)
    compare("norm", normed, F.rms_norm(residual + delta, (1024,), weight, 1e-6), 1e-5, 5e-6)
    compare("sum", total, residual + delta, 1e-5, 5e-6)

    report({"begin": "cross entropy"})
    logits = 3 * random(11, 9000)
    labels = torch.randint(0, 9000, (11,), generator=generator).int().to(on)
    wanted = F.cross_entropy(logits, labels.long(), reduction="none")
    compare("cross entropy", cross_entropy_(logits, labels, 0.0, None, 9000), wanted, 1e-5, 1e-5)

    report({"begin": "attention"})
    tokens, heads, head_dim = 200, 4, 64
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    qkv = random(tokens, 3 * heads * head_dim).to(dtype)
    starts = torch.tensor([0] * 120 + [120] * 80, dtype=torch.int32, device=on)[None]
    out, _ = document_attention(qkv, starts, heads, heads)
    query, key, value = qkv.float().view(tokens, 3, heads, head_dim).permute(1, 2, 0, 3)
    place = torch.arange(tokens, device=on)
    seen = (place[None, :] <= place[:, None]) & (place[None, :] >= starts[0, :, None])
    scores = (query @ key.transpose(1, 2) * head_dim**-0.5).masked_fill(~seen, -torch.inf)
    wanted = (scores.double().softmax(-1) @ value.double()).transpose(0, 1).reshape(tokens, -1)
    # bf16 has 8 bits: what is stored differs by 2^-8 of itself, and so do the weights of the sum.
    allowed = 2e-6 if dtype == torch.float32 else 2**-6
    compare("attention", out, wanted, 0.0 if dtype == torch.float32 else 2**-6, allowed)
