"""Singular values and factors of matrices, robustly and in single or double precision, never in half.

Every function takes a batch of matrices (G, m, n), one for each group of a convolution, or a single one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError


def precise(tensor: Tensor) -> Tensor:
    """A detached copy in fp32, or in fp64 if it is that already.

    Example:
        >>> precise(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def check_finite(matrix: Tensor) -> None:
    """Refuse what has no singular values.

    Raises:
        CompressionError: If an entry is infinite or no number.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise CompressionError("its weights hold NaN or infinite values, which have no singular value decomposition")


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition, with signs that do not depend on the machine.

    Args:
        matrix: Shape (..., m, n), finite.

    Returns:
        U (..., m, k), S (..., k) descending, Vh (..., k, n) with k = min(m, n).

    Raises:
        CompressionError: If an entry is not finite, or neither of two algorithms converges.

    Example:
        >>> u, s, vh = svd(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
        >>> s
        tensor([3., 2.])
    """
    matrix = precise(matrix)
    check_finite(matrix)
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except RuntimeError:  # torch.linalg.LinAlgError: a badly conditioned matrix can defeat the driver
        u, s, vh = _svd_by_eigenvalues(matrix)
    # The largest entry of each right vector is positive.
    top = vh.gather(-1, vh.abs().argmax(-1, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(vh.dtype)
    return u * sign.transpose(-1, -2), s, vh * sign


def _svd_by_eigenvalues(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the eigenvectors of the smaller Gram matrix, in double precision."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = (matrix if wide else matrix.transpose(-1, -2)).double()
    try:
        values, vectors = torch.linalg.eigh(x @ x.transpose(-1, -2))
    except RuntimeError as error:
        raise CompressionError(f"its singular value decomposition does not converge ({error})") from error
    s = values.flip(-1).clamp_min(0).sqrt()
    left = vectors.flip(-1)
    scale = torch.where(s > s[..., :1] * 1e-12, 1 / s.clamp_min(1e-300), torch.zeros_like(s))
    right = scale[..., None] * (left.transpose(-1, -2) @ x)
    u, vh = (left, right) if wide else (right.transpose(-1, -2), left.transpose(-1, -2))
    return u.to(matrix.dtype), s.to(matrix.dtype), vh.to(matrix.dtype)


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values (..., k), descending.

    Raises:
        CompressionError: If an entry is not finite, or the computation does not converge.
    """
    matrix = precise(matrix)
    check_finite(matrix)
    try:
        values: Tensor = torch.linalg.svdvals(matrix)
    except RuntimeError:
        values = _svd_by_eigenvalues(matrix)[1]
    return values


def stable_rank(matrix: Tensor) -> float:
    """How many directions a matrix stretches as much as its first one: squared Frobenius norm by squared top value.

    Between 1 and the rank; for a batch the mean over its matrices.

    Args:
        matrix: Shape (..., m, n); zero matrices have stable rank 0.

    Example:
        >>> stable_rank(torch.eye(4)), stable_rank(torch.ones(3, 5))
        (4.0, 1.0)
    """
    values = singular_values(matrix.double()).square()
    ranks = values.sum(-1) / values[..., 0].clamp_min(1e-300)
    return round(float(ranks.mean()), 9)


def numerical_rank(values: Tensor, shape: torch.Size | tuple[int, ...]) -> int:
    """How many singular values are more than rounding noise, in any matrix of the batch; at least 1.

    Args:
        values: Singular values (..., k), descending.
        shape: Shape of the matrices, (..., m, n).

    Example:
        >>> numerical_rank(torch.tensor([3.0, 1.0, 1e-9]), (3, 4))
        2
    """
    floor = values.amax() * max(shape[-2:]) * torch.finfo(values.dtype).eps
    return max(1, int((values > floor).sum(-1).max()))


def best_factors(matrix: Tensor, rank: int, covariance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors B A of a rank that are nearest to a matrix, balanced (B^T B = A A^T without whitening).

    Without covariance nearest in the Frobenius norm (Eckart and Young, 1936); with it nearest in what comes out for
    inputs of that covariance (SVD-LLM, Wang et al., ICLR 2025).

    Args:
        matrix: Shape (G, m, n).
        rank: At most min(m, n).
        covariance: Mean of x x^T over inputs x, shape (G, n, n).

    Returns:
        B (G, m, rank) and A (G, rank, n).

    Raises:
        CompressionError: If the matrix is not finite or the decomposition does not converge.
    """
    if covariance is None:
        u, s, vh = svd(matrix)
    else:
        root, inverse = whitener(covariance)
        u, s, vh = svd(precise(matrix).double() @ root)
        vh = vh @ inverse
    scale = s[..., :rank].sqrt()
    return u[..., :rank] * scale[..., None, :], scale[..., None] * vh[..., :rank, :]


def whitener(covariance: Tensor, floor: float = 1e-8) -> tuple[Tensor, Tensor]:
    """A root S of a covariance, S S^T = C, and its inverse.

    Cholesky where it exists; with fewer samples than dimensions it does not, and eigenvectors take its place.

    Args:
        covariance: Symmetric, positive semi-definite, shape (G, n, n).
        floor: Eigenvalues below this share of the largest are raised to it, so that the inverse exists.

    Raises:
        CompressionError: If it is not finite.

    Example:
        >>> root, inverse = whitener(torch.diag(torch.tensor([4.0, 0.0]))[None])
        >>> torch.allclose(root @ inverse, torch.eye(2, dtype=torch.float64)[None])
        True
    """
    c = covariance.double()
    check_finite(c)
    scale = c.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-30)
    c = c / scale
    root, info = torch.linalg.cholesky_ex(c)
    pivots = root.diagonal(dim1=-2, dim2=-1)
    if not bool(info.any()) and bool((pivots.amin(-1) ** 2 > floor * pivots.amax(-1) ** 2).all()):
        identity = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device).expand_as(c)
        inverse = torch.linalg.solve_triangular(root, identity, upper=False)
    else:
        values, vectors = torch.linalg.eigh(c)
        values = torch.maximum(values, floor * values[..., -1:].clamp_min(floor)).sqrt()
        root = vectors * values[..., None, :]
        inverse = (vectors / values[..., None, :]).transpose(-1, -2)
    return root * scale.sqrt(), inverse / scale.sqrt()
