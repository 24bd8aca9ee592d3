"""Multi-bit codes: a row of weights as a sum of a few scaled vectors of signs, ``w ~ a_1 b_1 + ... + a_k b_k``.

Xu, Yao, Lin, Ou, Cao, Wang and Zha, "Alternating Multi-bit Quantization for Recurrent Neural Networks", ICLR 2018:
with the codes ``b`` fixed the coefficients ``a`` are a least-squares problem of k unknowns; with the coefficients fixed
the best code of each element is found by a binary search among the ``2 ** k`` values. Two rounds, started from the
greedy codes of Guo et al. (CVPR 2017), are enough. All rows are solved at once.

`greedy` and `refined` are what the paper compares with; its third baseline is `lowbit.ternary_weight`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_RIDGE = 1e-9  # relative; splits the coefficient of two equal codes evenly instead of dividing by zero


class Codes(NamedTuple):
    """Rows as sums of scaled signs.

    Attributes:
        alphas: Coefficients (R, k), in float32 (float64 of float64 rows).
        signs: Bool (R, k, n), true for +1 and false for -1.
        kept: Bool (R, n), false where an element is exactly zero whatever its code; ``None`` if there are none.
    """

    alphas: Tensor
    signs: Tensor
    kept: Tensor | None = None

    def rows(self) -> Tensor:
        """The sums (R, n)."""
        value = _sum(self.alphas.unsqueeze(2), self.signs, dim=1)
        return value if self.kept is None else value * self.kept


def greedy(rows: Tensor, bits: int, kept: Tensor | None = None) -> Codes:
    """Codes one after the other, each the best for what the ones before it left over (Guo et al., CVPR 2017).

    Args:
        rows: Floats (R, n).
        bits: Number of codes k, 1 to 4.
        kept: Bool (R, n), false where an element stays zero and counts for nothing.

    Returns:
        The codes; the coefficients do not increase.

    Example:
        >>> codes = greedy(torch.tensor([[1.0, -2.0, 4.0, 5.0]]), bits=1)
        >>> codes.rows()
        tensor([[ 3., -3.,  3.,  3.]])
    """
    return _one_by_one(rows, bits, kept, refit=False)


def refined(rows: Tensor, bits: int, kept: Tensor | None = None) -> Codes:
    """Like `greedy`, but all coefficients are fitted anew after each code (Guo et al., CVPR 2017).

    Args:
        rows: Floats (R, n).
        bits: Number of codes k, 1 to 4.
        kept: Bool (R, n), false where an element stays zero and counts for nothing.

    Returns:
        The codes.

    Example:
        >>> x = torch.tensor([[1.0, -2.0, 4.0, 5.0]])
        >>> error = (refined(x, bits=2).rows() - x).norm()
        >>> bool(error <= (greedy(x, bits=2).rows() - x).norm())
        True
    """
    return _one_by_one(rows, bits, kept, refit=True)


def alternating(rows: Tensor, bits: int, cycles: int = 2, kept: Tensor | None = None) -> Codes:
    """Codes of a small squared error, by alternating least squares and optimal codes (Xu et al., ICLR 2018).

    Args:
        rows: Floats (R, n).
        bits: Number of codes k, 1 to 4.
        cycles: Rounds of alternation. The first begins with the greedy codes and is never worse than they are; each
            further one makes the error smaller or leaves it.
        kept: Bool (R, n), false where an element stays zero and counts for nothing.

    Returns:
        The codes, each element's being the best for the coefficients, which are not negative and do not increase. One
        code is ``sign(w) * mean(abs(w))``, the best there is.

    Raises:
        ValueError: If `bits` or `cycles` is out of range, or `rows` is no matrix of floats.

    Example:
        >>> alternating(torch.tensor([[0.1, -0.3, 0.9, 1.1]]), bits=2).rows()
        tensor([[ 0.2000, -0.2000,  1.0000,  1.0000]])
    """
    alphas = coefficients(rows, bits, cycles, kept)
    return Codes(alphas, best_signs(_exact(rows), alphas), kept)


def coefficients(rows: Tensor, bits: int, cycles: int = 2, kept: Tensor | None = None) -> Tensor:
    """The coefficients of `alternating`, without its codes: what `nearest` needs to quantize.

    The error depends on magnitudes only (turning the sign of an element turns its codes), and the least-squares problem
    only on how many elements share a code and on their sums, so nothing larger than the rows is ever made.

    Args:
        rows: Floats (R, n).
        bits: Number of codes k, 1 to 4.
        cycles: Rounds of alternation.
        kept: Bool (R, n), false where an element stays zero and counts for nothing.

    Returns:
        Floats (R, k), not negative, in descending order.

    Raises:
        ValueError: If `bits` or `cycles` is out of range, or `rows` is no matrix of floats.

    Example:
        >>> coefficients(torch.tensor([[0.1, -0.3, 0.9, 1.1]]), bits=2)
        tensor([[0.6000, 0.4000]])
    """
    if not isinstance(cycles, int) or cycles < 0:
        raise ValueError(f"cycles is a whole number, 0 or more; got {cycles!r}")
    _check(rows, bits)
    magnitudes = _exact(rows).abs()
    magnitudes = magnitudes if kept is None else magnitudes * kept
    count = _count(rows, kept)
    alphas, shares = _greedy_shares(magnitudes, bits, count, kept)
    for cycle in range(cycles if bits > 1 else 0):
        alphas = _refit(shares if cycle == 0 else _shares(magnitudes, alphas, count, kept), count)
    return alphas


def nearest(rows: Tensor, alphas: Tensor) -> Tensor:
    """Round each element to the nearest of the ``2 ** k`` sums of its row.

    Args:
        rows: Floats (R, n).
        alphas: Coefficients (R, k) of the same type.

    Returns:
        The rounded rows (R, n).

    Example:
        >>> nearest(torch.tensor([[3.3, 0.9, -1.2]]), torch.tensor([[2.0, 1.0]]))
        tensor([[ 3.,  1., -1.]])
    """
    values, _, middles = _levels(alphas)
    magnitudes, steps = rows.abs(), values.diff(dim=1)
    found = values[:, :1].expand_as(rows)
    for level in range(steps.shape[1]):
        found = torch.where(magnitudes >= middles[:, level, None], values[:, level + 1, None], found)
    return torch.where(rows < 0, -found, found)


def best_signs(rows: Tensor, alphas: Tensor) -> Tensor:
    """The codes of the nearest of the ``2 ** k`` sums.

    Args:
        rows: Floats (R, n).
        alphas: Coefficients (R, k) of the same type.

    Returns:
        Bool (R, k, n); of two sums equally near, either.

    Example:
        >>> best_signs(torch.tensor([[3.0, 0.9]]), torch.tensor([[2.0, 1.0]]))
        tensor([[[ True,  True],
                 [ True, False]]])
    """
    _, signs, middles = _levels(alphas)
    level = torch.searchsorted(middles, rows.abs(), right=True)  # (R, n)
    index = level.unsqueeze(2).expand(-1, -1, signs.shape[2])
    return (signs.gather(1, index) ^ (rows < 0).unsqueeze(2)).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------ the parts
def _exact(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _plus_minus(signs: Tensor, dtype: torch.dtype) -> Tensor:
    return signs.to(dtype) * 2 - 1


def _sum(alphas: Tensor, signs: Tensor, dim: int) -> Tensor:
    """Sum of scaled signs along a dimension, always in the same order, so that stored codes give the trained numbers.

    No matrix product: autocast and TF32 would round it.
    """
    parts = [torch.where(s, a, -a) for a, s in zip(alphas.unbind(dim), signs.unbind(dim), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _check(rows: Tensor, bits: int) -> None:
    if bits not in (1, 2, 3, 4) or rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"1 to 4 bits for a matrix of floats; got bits={bits!r}, {rows.dtype} {tuple(rows.shape)}")


def _count(rows: Tensor, kept: Tensor | None) -> Tensor:
    """How many elements of each row count (R, 1), at least 1."""
    if kept is None:
        return rows.new_full((1, 1), max(rows.shape[1], 1), dtype=_exact(rows).dtype).expand(len(rows), 1)
    return kept.sum(dim=1, keepdim=True).clamp(min=1).to(_exact(rows).dtype)


def _one_by_one(rows: Tensor, bits: int, kept: Tensor | None, refit: bool) -> Codes:
    _check(rows, bits)
    exact, count = _exact(rows), _count(rows, kept)
    residual = exact if kept is None else exact * kept
    alphas, signs = exact.new_empty(len(exact), 0), torch.empty(len(exact), 0, exact.shape[1], device=rows.device) > 0
    for _ in range(bits):
        alphas = torch.cat([alphas, residual.abs().sum(dim=1, keepdim=True) / count], dim=1)
        signs = torch.cat([signs, residual.unsqueeze(1) >= 0], dim=1)
        if refit:
            codes = _plus_minus(signs, torch.float64)
            codes = codes if kept is None else codes * kept.unsqueeze(1)
            alphas = _solve(codes @ codes.mT, codes @ exact.double().unsqueeze(2), count).to(exact.dtype)
        residual = exact - Codes(alphas, signs).rows()
        residual = residual if kept is None else residual * kept
    return Codes(alphas, signs, kept)


class _Shares(NamedTuple):
    """How the elements of each row are shared out among the codes that begin with the element's own sign."""

    signs: Tensor  # (R, C, k)
    counts: Tensor  # (R, C)
    sums: Tensor  # (R, C), of magnitudes


def _greedy_shares(magnitudes: Tensor, bits: int, count: Tensor, kept: Tensor | None) -> tuple[Tensor, _Shares]:
    """Greedy coefficients (R, k) and how their codes share out the elements."""
    residual, alphas = magnitudes, list[Tensor]()
    pattern = torch.zeros_like(magnitudes, dtype=torch.int64)  # of all codes but the first, which is +1
    for bit in range(bits):
        alphas.append(residual.abs().sum(dim=1, keepdim=True) / count)
        positive = residual >= 0
        pattern = pattern if bit == 0 else pattern | positive.long() << bit - 1
        residual = torch.where(positive, residual - alphas[-1], residual + alphas[-1])
        residual = residual if kept is None else residual * kept
    patterns = torch.arange(2 ** (bits - 1), device=magnitudes.device)
    signs = 1 + 2 * patterns[:, None] >> torch.arange(bits, device=magnitudes.device) & 1 == 1
    counts, sums = list[Tensor](), list[Tensor]()
    for index in range(len(patterns)):  # no scatter: its order of summation changes from run to run on a GPU
        here = pattern == index if kept is None else (pattern == index) & kept
        counts.append(here.sum(dim=1, keepdim=True).to(magnitudes.dtype))
        sums.append((magnitudes * here).sum(dim=1, keepdim=True))
    shares = _Shares(signs.expand(len(magnitudes), -1, -1), torch.cat(counts, dim=1), torch.cat(sums, dim=1))
    return torch.cat(alphas, dim=1), shares


def _levels(alphas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of a row that are not negative, ascending; the others are their mirror image.

    Returns:
        The sums (R, C) with ``C = 2 ** (k - 1)``, their signs (R, C, k), and the middles between them (R, C - 1).
    """
    bits = alphas.shape[1]
    shifts = torch.arange(bits, device=alphas.device)
    table = torch.arange(2**bits, device=alphas.device)[:, None] >> shifts & 1 == 1  # (2 ** k, k)
    # Stable: of sums that are all zero, a pattern and its mirror image must not both be taken.
    values, order = _sum(alphas.unsqueeze(1), table.unsqueeze(0), dim=2).sort(dim=1, stable=True)
    half = len(table) // 2
    values, order = values[:, half:], order[:, half:]
    return values, table[order], ((values[:, 1:] + values[:, :-1]) / 2).contiguous()


def _shares(magnitudes: Tensor, alphas: Tensor, count: Tensor, kept: Tensor | None) -> _Shares:
    """How the best codes for the coefficients share out the elements."""
    _, signs, middles = _levels(alphas)
    counts, sums = [count], [magnitudes.sum(dim=1, keepdim=True)]  # of the elements at or above each level
    for level in range(middles.shape[1]):
        above = magnitudes >= middles[:, level, None]
        above = above if kept is None else above & kept
        counts.append(above.sum(dim=1, keepdim=True).to(magnitudes.dtype))
        sums.append((magnitudes * above).sum(dim=1, keepdim=True))
    none = torch.zeros_like(count)
    counts_at, sums_at = (-torch.cat([*above, none], dim=1).diff(dim=1) for above in (counts, sums))
    return _Shares(signs, counts_at, sums_at)


def _refit(shares: _Shares, count: Tensor) -> Tensor:
    """The best coefficients for given codes, made positive and put in descending order."""
    codes = _plus_minus(shares.signs, torch.float64)  # (R, C, k)
    gram = codes.mT @ (codes * shares.counts.unsqueeze(2))
    found = _solve(gram, codes.mT @ shares.sums.double().unsqueeze(2), count)
    # A negative coefficient is a positive one with the opposite code, and codes are searched next.
    return found.abs().sort(dim=1, descending=True).values.to(shares.sums.dtype)


def _solve(gram: Tensor, against: Tensor, count: Tensor) -> Tensor:
    """Least squares from the normal equations (R, k, k), (R, k, 1), in float64."""
    ridge = (_RIDGE * count.double()).unsqueeze(2) * torch.eye(gram.shape[1], dtype=torch.float64, device=gram.device)
    found: Tensor = torch.linalg.solve_ex(gram + ridge, against).result
    return found.squeeze(2)
