"""Make the codebooks of vector quantisation (:func:`robustdice.representation.codebook`).

    python scripts/codebooks.py

Those that are there are part of the format of plans and bundles: what this writes on another machine, or with another
version of PyTorch, may differ in a few numbers, and is to be thrown away.
"""

from __future__ import annotations

from pathlib import Path

import torch

from robustdice.representation import CODEBOOK_UNIT, VECTORS

SAMPLES = 200_000
ROUNDS = 100


def k_means(samples: torch.Tensor, count: int, rounds: int) -> torch.Tensor:
    """Lloyd's algorithm, from the first ``count`` of the samples on."""
    centres = samples[:count].clone()
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in torch.split(samples, 20_000)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, samples)
        members = torch.bincount(nearest, minlength=count)
        centres = torch.where(members[:, None] > 0, sums / members.clamp_min(1)[:, None], centres)
    return centres


def main() -> None:
    """Write them all."""
    folder = Path(__file__).parents[1] / "src" / "robustdice" / "codebooks"
    for name, weights in VECTORS.items():
        samples = torch.randn(SAMPLES, weights, generator=torch.Generator().manual_seed(0))
        centres = k_means(samples, 256, ROUNDS)
        codes = (centres / CODEBOOK_UNIT).round().clamp(-127, 127).to(torch.int8)
        (folder / f"{name}.bin").write_bytes(codes.numpy().tobytes())


if __name__ == "__main__":
    main()
