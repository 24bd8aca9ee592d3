"""Scores: how much a weight, or a unit of weights, is worth. Small scores are removed first."""

from __future__ import annotations

from torch import Tensor

from lightning_compress.pruning.units import Pattern, unit_norms


def magnitude(weight: Tensor) -> Tensor:
    """The absolute value of each weight: the strongest simple criterion when pruning is gradual.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015; Gale et al.,
    "The State of Sparsity in Deep Neural Networks", 2019, for how well it holds up.

    For plain global pruning `threshold.magnitude_keep_masks` gives the same masks without making this tensor.

    Args:
        weight: Tensor of any shape.

    Returns:
        Scores >= 0, same shape and dtype, without gradient.

    Example:
        >>> import torch
        >>> magnitude(torch.tensor([-2.0, 1.0]))
        tensor([2., 1.])
    """
    return weight.detach().abs()


def unit_scores(weight: Tensor, pattern: Pattern | str, *, out_dim: int = 0, normalise: bool = False) -> Tensor:
    """The L2 norm of each unit (row, column, filter or block), summed in fp32 (fp64 for fp64 weights).

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017 (there with the L1 norm).

    Args:
        weight: Weight of a Linear, convolution or transposed convolution, or element scores >= 0 of its shape.
        pattern: "row", "column", "filter" or "block:RxC".
        out_dim: Dimension of the output units: 0, or 1 for transposed convolutions.
        normalise: Divide by the square root of the unit's size, so that layers can be compared.

    Returns:
        `[units]` for row, column and filter; `[ceil(O / R), ceil(I / C), kernel positions]` for blocks.

    Raises:
        ValueError: The pattern has no units ("unstructured", "N:M") or `out_dim` is not 0 or 1.
        CompressionError: The pattern does not apply to a weight of this shape.

    Example:
        >>> import torch
        >>> unit_scores(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "row")
        tensor([5., 1.])
        >>> unit_scores(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "column")
        tensor([3.0000, 4.1231])
    """
    return unit_norms(weight, pattern, out_dim=out_dim, normalise=normalise)
