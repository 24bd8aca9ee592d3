"""Membership against a population, with as few as one reference model (RMIA, Zarifzadeh et al., ICML 2024)."""

from __future__ import annotations

import torch
from torch import Tensor


def rmia_scores(
    target_x: Tensor,
    references_x: Tensor,
    target_z: Tensor,
    references_z: Tensor,
    *,
    out_x: Tensor | None = None,
    a: float = 0.3,
    gamma: float = 1.0,
) -> Tensor:
    """Offline RMIA: how many other examples a candidate beats in how much the target knows it better than expected.

    The probability that a model of the world gives an example is taken from reference models that were not trained on
    it, moved up towards 1 for those that would have been: ``((1 + a) p_out + 1 - a) / 2``.

    Args:
        target_x: Log-probabilities that the target gives the labels of the candidates (N,).
        references_x: The same of K reference models (K, N).
        target_z: Of other examples of the population, not trained on by anybody (Z,).
        references_z: (K, Z).
        out_x: Which references were not trained on a candidate (K, N), bool; default: none was trained on any.
        a: How far probabilities of models that were trained on an example are from certainty; 1 if not at all.
        gamma: By which factor a candidate has to beat another example, at least 1.

    Returns:
        The share of the population that is beaten (N,), in [0, 1]; higher for members.

    Raises:
        ValueError: Shapes do not fit, or a candidate has no reference that was not trained on it.

    Reference: Zarifzadeh, Liu, Shokri 2024, arXiv 2312.03262.

    Example:
        >>> known, others = torch.tensor([-0.1, -2.0]), torch.full((50,), -2.0)
        >>> rmia_scores(known, torch.full((1, 2), -2.0), others, torch.full((1, 50), -2.0)).tolist()
        [1.0, 1.0]
        >>> rmia_scores(known, torch.full((1, 2), -2.0), others, torch.full((1, 50), -2.0), gamma=1.5).tolist()
        [1.0, 0.0]
    """
    if references_x.shape[1:] != target_x.shape or references_z.shape[1:] != target_z.shape:
        raise ValueError("references need one row a model and one column an example, like the target's")
    if len(references_x) != len(references_z) or not len(references_x):
        raise ValueError(f"expected the same references on both sides; got {len(references_x)}, {len(references_z)}")
    ratio_x = _ratio(target_x, references_x, out_x, a)
    ratio_z = _ratio(target_z, references_z, None, a).sort().values
    return torch.searchsorted(ratio_z, ratio_x / gamma, right=True).double() / len(ratio_z)


def _ratio(target: Tensor, references: Tensor, out: Tensor | None, a: float) -> Tensor:
    """How much likelier the target finds an example than models of the world do."""
    p = references.double().exp()
    if out is None:
        mean = p.mean(0)
    else:
        if not bool(out.any(0).all()):
            raise ValueError("a candidate has no reference model that was not trained on it")
        mean = (p * out).sum(0) / out.sum(0)
    return target.double().exp() / (((1 + a) * mean + 1 - a) / 2)
