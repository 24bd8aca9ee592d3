"""Decompositions of tensors with more than two dimensions: Tucker-2 by HOOI, CP by alternating least squares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.low_rank import matrices

HOOI_SWEEPS = 8
ALS_SWEEPS = 200


def hooi(cube: Tensor, rank_in: int, rank_out: int, sweeps: int = HOOI_SWEEPS) -> list[Tensor]:
    """Tucker-2: a core between a basis of the inputs and one of the outputs, by higher-order orthogonal iteration.

    De Lathauwer, De Moor and Vandewalle, "On the best rank-1 and rank-(R1, ..., RN) approximation of higher-order
    tensors" (SIAM J. Matrix Anal. Appl. 21, 2000).

    Args:
        cube: Weights (G, O, I, K).
        rank_in: Directions of the inputs.
        rank_out: Directions of the outputs.
        sweeps: How often each basis is improved for the other.

    Returns:
        (G, rank_in, I), the core (G, rank_out, rank_in, K), and (G, O, rank_out).

    Raises:
        CompressionError: If the weights are not finite or a decomposition does not converge.
    """
    by_input = cube.permute(0, 2, 1, 3).flatten(2)
    v_in, u_out = _basis(by_input, rank_in), cube.new_zeros(0)  # (G, I, r1), (G, O, r2)
    for _ in range(sweeps):
        u_out = _basis(torch.einsum("goik,gir->gork", cube, v_in).flatten(2), rank_out)
        v_in = _basis(torch.einsum("goik,gor->girk", cube, u_out).flatten(2), rank_in)
    core = torch.einsum("gor,goik,gis->grsk", u_out, cube, v_in)
    # Balanced: a third of the core's scale goes to each basis, so that no factor trains at a rate of its own.
    scale = core.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None] / max(core.shape[1:3].numel(), 1) ** 0.5
    third = scale ** (1 / 3)
    return [v_in.transpose(1, 2) * third, core / (third**2)[..., None], u_out * third]


def _basis(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors; zeros where there are fewer."""
    vectors = matrices.svd(matrix)[0][..., :rank]
    return F.pad(vectors, (0, rank - vectors.shape[-1]))


def cp_als(weight: Tensor, rank: int, sweeps: int = ALS_SWEEPS, ridge: float = 1e-9) -> list[Tensor]:
    """The canonical polyadic decomposition: a sum of `rank` outer products of one vector for each dimension.

    Args:
        weight: Any dimensions.
        rank: How many outer products.
        sweeps: Most rounds of alternating least squares; it ends earlier when the error no longer falls.
        ridge: Regularisation of the normal equations, relative to their diagonal.

    Returns:
        One matrix (size, rank) for each dimension, all columns of a direction of the same norm.
    """
    x = weight.double()
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(size, rank, generator=generator, dtype=torch.float64).to(x.device) for size in x.shape]
    for mode, size in enumerate(x.shape):  # start from the strongest directions where there are enough of them
        vectors = matrices.svd(x.movedim(mode, 0).flatten(1))[0]
        factors[mode][:, : min(rank, size)] = vectors[:, : min(rank, vectors.shape[1])][:, : min(rank, size)]
    before = float("inf")
    for _ in range(sweeps):
        for mode in range(x.dim()):
            factors[mode] = _least_squares(x, factors, mode, ridge)
        error = float((x - cp_merge(factors)).norm())
        if before - error < 1e-7 * float(x.norm()):
            break
        before = error
    norms = [factor.norm(dim=0).clamp_min(1e-30) for factor in factors]
    mean = torch.stack(norms).log().mean(0).exp()
    return [(factor / norm * mean).to(weight.dtype) for factor, norm in zip(factors, norms, strict=True)]


def cp_merge(factors: list[Tensor]) -> Tensor:
    """The tensor of a canonical polyadic decomposition."""
    letters = "abcdefgh"[: len(factors)]
    return torch.einsum(f"{','.join(f'{x}r' for x in letters)}->{letters}", *factors)


def _least_squares(x: Tensor, factors: list[Tensor], mode: int, ridge: float) -> Tensor:
    others = [factor for index, factor in enumerate(factors) if index != mode]
    gram = torch.ones(factors[0].shape[1], factors[0].shape[1], dtype=x.dtype, device=x.device)
    for other in others:
        gram = gram * (other.t() @ other)
    letters = "abcdefgh"[: len(others)]
    equation = f"z{letters},{','.join(f'{one}r' for one in letters)}->zr"
    right = torch.einsum(equation, x.movedim(mode, 0), *others)
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-30)
    solved: Tensor = torch.linalg.solve(gram, right.t())
    return solved.t()
