"""Where zeros may lie: single weights, N of M, rows, columns, filters, blocks.

N:M groups are M consecutive **input channels at one kernel position**. Sparse kernels compute a convolution as a
matrix product over channels-last memory: a filter is stored `[kh, kw, I]`, so what is consecutive along the reduced
dimension is the input channel, not the kernel column. A group may not straddle two kernel positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.threshold import keep_masks
from lightning_compress.pruning.units import Pattern as Pattern
from lightning_compress.pruning.units import canonical, norms_of, restore, spread, unit_sizes
from lightning_compress.pruning.units import parse as parse
from lightning_compress.ranks import Ranks


def pattern_keep_mask(
    scores: Tensor,
    pattern: Pattern | str,
    sparsity: float,
    already: Tensor | None = None,
    *,
    out_dim: int = 0,
    ranks: Ranks | None = None,
    name: str = "this weight",
) -> Tensor:
    """The keep mask of one weight (local scope), exact to one unit.

    Units are weights, groups (N:M), rows, columns, filters or blocks; `round(sparsity * units)` of them are removed,
    smallest L2 norm first (blocks: norm over the square root of the size, because blocks at the edge are smaller).
    Unless `sparsity` is 1, at least one row, column, filter or block stays.

    N:M ends at sparsity 1 - N/M. A lower sparsity, as a schedule asks for on the way, is reached by whole groups: the
    share `sparsity / (1 - N/M)` of the groups, those that lose the smallest L2 norm first, have the pattern, the
    others are dense. If I is not divisible by M, the last group of r < M inputs counts as padded with zeros: it keeps
    its `min(r, N)` largest, so the padded weight has the pattern (and layers with I <= N stay dense).

    Args:
        scores: Element scores of the weight's shape; >= 0 for all patterns but "unstructured".
        pattern: See `parse`.
        sparsity: Share of units to remove, 0 to 1; at most 1 - N/M for N:M.
        already: Earlier keep mask; what it dropped is dropped again, and counts.
        out_dim: Dimension of the output units: 0, or 1 for transposed convolutions.
        ranks: The group over which dimension 0 is sharded; one process by default.
        name: Name of the weight in error messages.

    Returns:
        Bool mask, shape of `scores`, True = keep.

    Raises:
        ValueError: `sparsity` or `out_dim` is out of range.
        CompressionError: The pattern does not apply to this shape or sharding, the sparsity cannot be met, or a score
            is NaN.

    Example:
        >>> import torch
        >>> pattern_keep_mask(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), "2:4", 0.5)
        tensor([[ True, False, False,  True]])
        >>> pattern_keep_mask(torch.tensor([[4.0, 1.0], [2.0, 3.0]]), "row", 0.5)
        tensor([[ True,  True],
                [False, False]])
    """
    pattern, ranks = parse(pattern), Ranks() if ranks is None else ranks
    _check_sparsity(sparsity, pattern, name)
    scores = scores.detach()
    if pattern.kind == "unstructured":
        remove = round(sparsity * _total(scores.numel(), scores, ranks))
        mask = keep_masks([scores], remove, ranks, already=[already], names=[name])[0]
    else:
        nan = torch.tensor([int(scores.isnan().any())], device=scores.device)
        if int(ranks.reduce(nan, "sum")):  # also where it would not be seen: in what is masked, among the largest
            raise _has_nan([name])
        scores_OIP = canonical(scores, pattern, out_dim, name)
        kept = None if already is None else canonical(already, pattern, out_dim, name)
        if pattern.kind == "n:m":
            keep = _n_m(scores_OIP, kept, pattern, sparsity, out_dim, ranks, name)
        else:
            keep = _units(scores_OIP, kept, pattern, sparsity, out_dim, ranks, name)
        mask = restore(keep, scores.shape, out_dim)
    return mask if already is None else mask & already


def global_keep_masks(
    scores: Sequence[Tensor],
    pattern: Pattern | str,
    sparsity: float,
    already: Sequence[Tensor | None] | None = None,
    *,
    out_dims: Sequence[int] | None = None,
    ranks: Ranks | None = None,
    names: Sequence[str] = (),
) -> list[Tensor]:
    """The keep masks of several weights that share one budget (global scope).

    Unstructured: exactly `round(sparsity * weights)` weights go. Rows, columns, filters and blocks are compared by L2
    norm over the square root of the unit's size; units go in that order until the removed weights are as near to
    `sparsity * weights` as one unit allows, but the last unit of a weight stays unless `sparsity` is 1. N:M has
    the same sparsity everywhere, so each weight is masked by itself.

    Args:
        scores: Element scores, one tensor per weight; >= 0 for all patterns but "unstructured".
        pattern: See `parse`.
        sparsity: Share of all weights to remove, 0 to 1; at most 1 - N/M for N:M.
        already: Earlier keep masks (or None); what they dropped is dropped again, and counts.
        out_dims: Dimension of the output units of each weight; 0 by default, 1 for transposed convolutions.
        ranks: The group over which dimension 0 is sharded ("unstructured" and N:M only).
        names: Names of the weights in error messages.

    Returns:
        One bool mask per weight, True = keep.

    Raises:
        ValueError: `sparsity` or one of `out_dims` is out of range.
        CompressionError: As `pattern_keep_mask`; also if keeping a unit in each weight makes the sparsity impossible.

    Example:
        >>> import torch
        >>> wide, narrow = torch.full((2, 4), 1.0), torch.tensor([[3.0], [0.5]])
        >>> global_keep_masks([wide, narrow], "row", 0.1)[1]
        tensor([[ True],
                [False]])
    """
    pattern, ranks = parse(pattern), Ranks() if ranks is None else ranks
    masks = [None] * len(scores) if already is None else list(already)
    dims = [0] * len(scores) if out_dims is None else list(out_dims)
    labels = [names[i] if i < len(names) else f"tensor {i}" for i in range(len(scores))]
    _check_sparsity(sparsity, pattern, ", ".join(labels))
    if pattern.kind == "unstructured":
        remove = round(sparsity * _total(sum(s.numel() for s in scores), scores[0], ranks)) if scores else 0
        keeps = keep_masks(scores, remove, ranks, already=masks, names=labels)
        return [k if m is None else k & m for k, m in zip(keeps, masks, strict=True)]
    rows = list(zip(scores, masks, dims, labels, strict=True))
    if pattern.kind == "n:m":
        return [pattern_keep_mask(s, pattern, sparsity, m, out_dim=d, ranks=ranks, name=n) for s, m, d, n in rows]
    if ranks.size > 1:
        raise CompressionError(
            f"global scope of pattern {pattern} needs whole weights; found weights sharded over {ranks.size} ranks: "
            'gather the unit scores and use `global_unit_keeps`, or use scope="local"'
        )
    return _global_units(rows, pattern, sparsity)


def global_unit_keeps(
    units: Sequence[Tensor], sizes: Sequence[Tensor], sparsity: float, *, names: Sequence[str] = ()
) -> list[Tensor]:
    """Which units stay when units of several weights share one budget of weights.

    Args:
        units: Scores of the units of each weight, 1-D, comparable across weights; lowest go first, ties by position.
        sizes: Number of weights in each unit, same shapes.
        sparsity: Share of all weights to remove, 0 to 1.
        names: Names of the weights in error messages.

    Returns:
        One 1-D bool tensor per weight, True = keep. Unless `sparsity` is 1, at least one unit of each stays.

    Raises:
        CompressionError: A score is NaN, or keeping one unit in each weight makes the sparsity impossible by more
            than one unit.

    Example:
        >>> import torch
        >>> ones = torch.ones(2, dtype=torch.int64)
        >>> global_unit_keeps([torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])], [ones, ones], 0.5)
        [tensor([False,  True]), tensor([False,  True])]
    """
    if not units:
        return []
    counts = [u.numel() for u in units]
    values, weights = torch.cat(list(units)), torch.cat([s.to(torch.int64) for s in sizes])
    if bool(values.isnan().any()):
        bad = [names[i] if i < len(names) else f"tensor {i}" for i, u in enumerate(units) if bool(u.isnan().any())]
        raise _has_nan(bad)
    if sparsity == 1:
        return [torch.zeros_like(u, dtype=torch.bool) for u in units]
    stays = torch.zeros_like(values, dtype=torch.bool)
    start = 0
    for unit in units:  # the best unit of each weight stays
        if unit.numel():
            stays[start + int(unit.flip(0).argmax().neg() + unit.numel() - 1)] = True
        start += unit.numel()
    order = values.sort(stable=True).indices
    order = order[~stays[order]]
    removed = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])
    wanted = sparsity * int(weights.sum())
    if wanted - int(removed[-1]) > int(weights.max()):
        raise CompressionError(
            f"sparsity {sparsity} cannot be met: one unit of each of {len(units)} weights stays, so at most "
            f"{int(removed[-1])} of {int(weights.sum())} weights can go; lower the sparsity or exclude narrow layers"
        )
    nearest = int((removed - wanted).abs().argmin())
    keep = torch.ones_like(stays)
    keep[order[:nearest]] = False
    return list(torch.split(keep, counts))


def _has_nan(names: Sequence[str]) -> CompressionError:
    return CompressionError(
        f"scores of {', '.join(names)} contain NaN, so they have no order and no mask can be made; find the step at "
        "which the weights diverged (detect_anomaly, a lower learning rate) and restart before it"
    )


def _check_sparsity(sparsity: float, pattern: Pattern, name: str) -> None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is a share between 0 and 1; found {sparsity}")
    if sparsity > pattern.most + 1e-9:
        raise CompressionError(
            f"pattern {pattern} ends at sparsity {pattern.most:g}; {sparsity} was asked of {name}: "
            "ask for at most that, or choose another pattern"
        )


def _total(local: int, like: Tensor, ranks: Ranks) -> int:
    return int(ranks.reduce(torch.tensor([local], device=like.device), "sum"))


def _global_units(
    rows: list[tuple[Tensor, Tensor | None, int, str]], pattern: Pattern, sparsity: float
) -> list[Tensor]:
    """Masks of rows, columns, filters or blocks; a row is (scores, earlier mask, out_dim, name)."""
    bad = [label for score, _, _, label in rows if bool(score.isnan().any())]
    if bad:  # also in what is masked already
        raise _has_nan(bad)
    shapes, sizes, units = [], [], []
    for score, mask, dim, label in rows:
        scores_OIP = canonical(score.detach(), pattern, dim, label)
        size, gone = unit_sizes(score, pattern, dim), None
        if mask is not None:
            kept_OIP = canonical(mask, pattern, dim, label)
            gone, scores_OIP = norms_of(kept_OIP.float(), pattern) == 0, scores_OIP.masked_fill(~kept_OIP, 0)
        norms = norms_of(scores_OIP, pattern)
        norms = norms / size.clamp(min=1).sqrt().to(norms.dtype)  # of an empty weight: zero, not NaN
        units.append((norms if gone is None else norms.masked_fill(gone, -1.0)).flatten())
        sizes.append(size.expand_as(norms).flatten())
        shapes.append((norms.shape, scores_OIP.shape))
    keeps = global_unit_keeps(units, sizes, sparsity, names=[row[3] for row in rows])
    results = []
    for keep, (unit_shape, shape_OIP), (score, mask, dim, _) in zip(keeps, shapes, rows, strict=True):
        full = restore(spread(keep.view(unit_shape), shape_OIP, pattern), score.shape, dim)
        results.append(full if mask is None else full & mask)
    return results


def _units(
    scores_OIP: Tensor,
    kept_OIP: Tensor | None,
    pattern: Pattern,
    sparsity: float,
    out_dim: int,
    ranks: Ranks,
    name: str,
) -> Tensor:
    """Mask `[O, I, P]` of whole rows, columns, filters or blocks."""
    if pattern.kind == "block" and ranks.size > 1:
        raise CompressionError(
            f"pattern {pattern} needs whole weights; {name} is sharded over {ranks.size} ranks: gather it first, or "
            'use "row", "N:M" or "unstructured"'
        )
    if kept_OIP is not None:
        scores_OIP = scores_OIP.masked_fill(~kept_OIP, 0)
    norms = norms_of(scores_OIP, pattern)
    gone = None if kept_OIP is None else norms_of(kept_OIP.float(), pattern) == 0
    if pattern.kind == "block":
        norms = norms / unit_sizes(scores_OIP, pattern, 0).sqrt().to(norms.dtype)
    elif (out_dim if pattern.kind in ("row", "filter") else 1 - out_dim) == 1:  # each rank holds a part of each unit
        norms = ranks.reduce(norms.square(), "sum").sqrt() if ranks.size > 1 else norms
        gone = None if gone is None else ranks.reduce((~gone).long(), "sum") == 0
        ranks = Ranks()
    total = _total(norms.numel(), norms, ranks)
    remove = round(sparsity * total)
    if 0 < sparsity < 1 and total == 1:
        raise CompressionError(
            f"{name} has one unit of pattern {pattern}, so sparsity {sparsity} cannot be met: exclude it"
        )
    if sparsity < 1:
        remove = min(remove, max(total - 1, 0))
    already = None if gone is None else [~gone]
    keep = keep_masks([norms], remove, ranks, already=already, names=[name])[0]
    return spread(keep, scores_OIP.shape, pattern)


def _n_m(
    scores_OIP: Tensor,
    kept_OIP: Tensor | None,
    pattern: Pattern,
    sparsity: float,
    out_dim: int,
    ranks: Ranks,
    name: str,
) -> Tensor:
    """Mask `[O, I, P]` in which the cheapest share of the groups has the pattern."""
    if out_dim == 1 and ranks.size > 1:
        raise CompressionError(
            f"pattern {pattern} groups the input dimension, over which {name} is sharded ({ranks.size} ranks): "
            "shard another dimension, or exclude it"
        )
    n, m = pattern.sizes
    outs, ins, positions = scores_OIP.shape
    dtype = torch.float64 if scores_OIP.dtype == torch.float64 else torch.float32
    scores_OPI = scores_OIP.movedim(1, 2).to(dtype)
    worth = scores_OPI
    if kept_OIP is not None:
        dropped = ~kept_OIP.movedim(1, 2)
        scores_OPI, worth = scores_OPI.masked_fill(dropped, 0), worth.masked_fill(dropped, torch.finfo(dtype).min)
    groups = -(-ins // m)
    pad = (0, groups * m - ins)
    worth = torch.nn.functional.pad(worth, pad, value=-torch.inf).reshape(outs, positions, groups, m)
    scores = torch.nn.functional.pad(scores_OPI, pad).reshape(worth.shape)
    drop = torch.zeros(worth.shape, dtype=torch.bool, device=worth.device)
    drop.scatter_(3, worth.sort(dim=3, stable=True).indices[..., : m - n], True)
    loss = torch.linalg.vector_norm(scores.masked_fill(~drop, 0), dim=3)
    finished = None
    if kept_OIP is not None:  # groups that have the pattern already go first
        stays = torch.nn.functional.pad(kept_OIP.movedim(1, 2), pad).reshape(worth.shape)
        finished = [(stays & drop).any(3)]
    wanted = round(sparsity / pattern.most * _total(loss.numel(), loss, ranks))
    dense = keep_masks([loss], wanted, ranks, already=finished, names=[name])[0]
    keep = (~drop | dense.unsqueeze(3)).reshape(outs, positions, groups * m)[..., :ins]
    return keep.movedim(2, 1)
