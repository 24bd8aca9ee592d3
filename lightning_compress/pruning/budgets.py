"""How much to cut from which family of channels, so that a target of MACs, parameters or channels is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lightning_compress.errors import CompressionError

Unit = Literal["macs", "parameters", "channels"]
TOLERANCE = 0.02  # of the dense cost: closer than this to the target, nothing more is tried


@dataclass(frozen=True)
class Budget:
    """What to keep of the dense model; exactly one of the three.

    Args:
        keep_macs: Share of the dense multiply-accumulates of the example call to keep, in (0, 1].
        keep_parameters: Share of the dense parameters to keep, in (0, 1].
        ratio: Share of the dense channels that no longer exist, in [0, 1): of every layer (``scope="local"``) or of
            all of them together (``scope="global"``).

    Raises:
        ValueError: If not exactly one is given, or it is out of range.

    Example:
        >>> from lightning_compress.pruning.budgets import Budget
        >>> Budget(keep_macs=0.5).at(0.5)
        Budget(keep_macs=0.75, keep_parameters=None, ratio=None)
    """

    keep_macs: float | None = None
    keep_parameters: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of keep_macs, keep_parameters and ratio; got {given or 'none'}")
        for name, value in given.items():
            ok = 0 <= value < 1 if name == "ratio" else 0 < value <= 1
            if not ok:
                interval = "[0, 1)" if name == "ratio" else "(0, 1]"
                raise ValueError(f"{name} must lie in {interval}; got {value}")

    @property
    def unit(self) -> Unit:
        """What is counted."""
        return "macs" if self.keep_macs is not None else "parameters" if self.ratio is None else "channels"

    @property
    def keep(self) -> float:
        """Share of the dense amount to keep, in (0, 1]."""
        values = (self.keep_macs, self.keep_parameters, None if self.ratio is None else 1 - self.ratio)
        return next(float(v) for v in values if v is not None)

    def at(self, progress: float) -> Budget:
        """The budget when a share `progress` in [0, 1] of the cutting is to be done."""
        if self.ratio is not None:
            return Budget(ratio=progress * self.ratio)
        keep = 1 - progress * (1 - self.keep)
        return Budget(keep_macs=keep) if self.keep_macs is not None else Budget(keep_parameters=keep)


@dataclass(frozen=True)
class DenseReference:
    """The model before the first cut: what all shares are relative to, so that several events never compound.

    Args:
        macs: Multiply-accumulates of the example call.
        parameters: Number of parameters (a tied one counts once).
        widths: Output channels by layer.
        units: Removable units by family.
    """

    macs: float
    parameters: int
    widths: Mapping[str, int]
    units: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "macs": float(self.macs), "parameters": int(self.parameters),
            "widths": dict(self.widths), "units": dict(self.units),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DenseReference:
        """The inverse of `to_dict`."""
        return cls(data["macs"], data["parameters"], data["widths"], data["units"])


@dataclass(frozen=True)
class CostModel:
    """Cost as a function of how many units each family loses: constant + sum of weight * (share kept of each side).

    A tensor cut along two dimensions makes its term bilinear; MACs and parameters have the same form.

    Args:
        constant: What no cut changes.
        weights: Cost of each tensor now, shape (tensors,).
        full: Width of each tensor's two dimensions, shape (tensors, 2); 1 where a dimension is not cut.
        first: Channels of dimension 0 that one unit of each family takes, shape (tensors, families).
        second: The same for dimension 1.
    """

    constant: float
    weights: np.ndarray
    full: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def __call__(self, cut: np.ndarray) -> float:
        """Cost after `cut` units of each family (int, shape (families,)) are gone."""
        left = (self.full[:, 0] - self.first @ cut) / self.full[:, 0]
        right = (self.full[:, 1] - self.second @ cut) / self.full[:, 1]
        return float(self.constant + (self.weights * left * right).sum())


@dataclass(frozen=True)
class Supply:
    """What one family can give.

    Args:
        key: Name of the family.
        units: Units it has now.
        dense: Units it had in the dense model.
        step: Output channels of its first layer that one unit takes.
        width: Output channels of that layer now.
        floor: Fewest units that should stay; given up if the target needs it.
        least: Fewest units that may stay, whatever the target.
        scores: Importance of each unit, shape (units,).
        round_to: The kept width is a multiple of this many channels.
    """

    key: str
    units: int
    dense: int
    step: int
    width: int
    floor: int
    least: int
    scores: np.ndarray
    round_to: int

    def allowed(self, round_to: int, floor: int) -> np.ndarray:
        """Numbers of units that may be cut, ascending from 0, so that the kept width is a multiple of `round_to`."""
        cuts = np.arange(max(self.units - floor, 0) + 1)
        allowed: np.ndarray = cuts[(cuts == 0) | ((self.width - cuts * self.step) % round_to == 0)]
        return allowed


@dataclass
class Solution:
    """How many units each family loses.

    Args:
        cut: Units to cut, shape (families,).
        cost: Cost then.
        notes: What had to be relaxed.
    """

    cut: np.ndarray
    cost: float
    notes: list[str] = field(default_factory=list)


def solve(
    supplies: Sequence[Supply],
    cost: CostModel,
    target: float,
    tolerance: float,
    scope: Literal["global", "local"],
    fixed: str,
) -> Solution:
    """Cut the fewest units, in order of importance, that bring the cost down to the target.

    Global scope takes units in the order of their scores over all families; local scope takes from each family the
    same share of its dense units. Then units are given back where more than `tolerance` below the target. The kept
    widths' rounding is relaxed to 4, 2, 1, family by family from the last one cut, only if the tolerance is missed.

    Args:
        supplies: The families.
        cost: Cost of a choice.
        target: Largest cost that is accepted.
        tolerance: How far below the target the cost may stay if a smaller step exists.
        scope: ``"global"`` or ``"local"``.
        fixed: What cannot be cut and why, for the error.

    Raises:
        CompressionError: If the target cannot be reached.
    """
    nothing = np.zeros(len(supplies), np.int64)
    if cost(nothing) <= target:
        return Solution(nothing, cost(nothing))
    notes: list[str] = []
    rounding = [s.round_to for s in supplies]
    floors = [s.floor for s in supplies]
    order = _order(supplies, floors, scope)
    if _cost_at(len(order), order, supplies, rounding, floors, cost) > target:
        rounding, floors = [1] * len(supplies), [s.least for s in supplies]
        order = _order(supplies, floors, scope)
        smallest = _cost_at(len(order), order, supplies, rounding, floors, cost)
        if smallest > target:
            raise CompressionError(
                f"the target {target:.6g} cannot be met: with the fewest units left of everything that can be cut the "
                f"model still costs {smallest:.6g}; ask for at least that much. Fixed: {fixed}"
            )
        notes.append("the target needs more than the usual largest share of a layer; floors and rounding are lifted")
    best = _fill(*_bisect(order, supplies, rounding, floors, cost, target), supplies, rounding, floors, cost, target)
    for _ in range(3 * len(supplies)):
        gap = target - best.cost
        loose = [f for f in _latest(order, best.cut, supplies) if rounding[f] > 1]
        if gap <= tolerance or not loose:
            break
        rounding[loose[0]] = next(r for r in (4, 2, 1) if r < rounding[loose[0]])
        new = _fill(*_bisect(order, supplies, rounding, floors, cost, target), supplies, rounding, floors, cost, target)
        best = new if new.cost > best.cost else best
    for f, supply in enumerate(supplies):
        if (
            rounding[f] < supply.round_to
            and best.cut[f]
            and (supply.width - best.cut[f] * supply.step) % supply.round_to
        ):
            kept = supply.width - int(best.cut[f]) * supply.step
            notes.append(f"{supply.key}: {kept} channels kept, not a multiple of {supply.round_to}, to meet the target")
    if target - best.cost > tolerance:
        notes.append(f"the nearest reachable cost not above the target {target:.6g} is {best.cost:.6g}")
    return Solution(best.cut, best.cost, notes)


def _order(supplies: Sequence[Supply], floors: Sequence[int], scope: str) -> np.ndarray:
    """Family of each cut, in the order in which units go."""
    keys, families, ranks = [], [], []
    for f, supply in enumerate(supplies):
        count = max(supply.units - floors[f], 0)
        if scope == "global":
            keys.append(np.sort(supply.scores)[:count])
        else:
            keys.append((supply.dense - supply.units + np.arange(1, count + 1)) / supply.dense)
        families.append(np.full(count, f))
        ranks.append(np.arange(count))
    if not keys:
        return np.zeros(0, np.int64)
    family = np.concatenate(families)
    return np.asarray(family[np.lexsort((np.concatenate(ranks), family, np.concatenate(keys)))])


def _rounded(
    n: int, order: np.ndarray, supplies: Sequence[Supply], rounding: Sequence[int], floors: Sequence[int]
) -> np.ndarray:
    raw = np.bincount(order[:n], minlength=len(supplies))
    cut = np.zeros(len(supplies), np.int64)
    for f, supply in enumerate(supplies):
        if raw[f]:
            allowed = supply.allowed(rounding[f], floors[f])
            cut[f] = allowed[np.searchsorted(allowed, raw[f], side="right") - 1]
    return cut


def _cost_at(
    n: int,
    order: np.ndarray,
    supplies: Sequence[Supply],
    rounding: Sequence[int],
    floors: Sequence[int],
    cost: CostModel,
) -> float:
    return cost(_rounded(n, order, supplies, rounding, floors))


def _bisect(
    order: np.ndarray,
    supplies: Sequence[Supply],
    rounding: Sequence[int],
    floors: Sequence[int],
    cost: CostModel,
    target: float,
) -> tuple[np.ndarray, np.ndarray]:
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if _cost_at(middle, order, supplies, rounding, floors, cost) <= target:
            high = middle
        else:
            low = middle + 1
    return order, _rounded(high, order, supplies, rounding, floors)


def _fill(
    order: np.ndarray,
    cut: np.ndarray,
    supplies: Sequence[Supply],
    rounding: Sequence[int],
    floors: Sequence[int],
    cost: CostModel,
    target: float,
) -> Solution:
    """Give units back, the most important first, as long as the target holds."""
    cut = cut.copy()
    for f in _latest(order, cut, supplies):
        allowed = supplies[f].allowed(rounding[f], floors[f])
        while cut[f]:
            trial = cut.copy()
            trial[f] = allowed[np.searchsorted(allowed, cut[f], side="left") - 1]
            if cost(trial) > target:
                break
            cut = trial
    return Solution(cut, cost(cut))


def _latest(order: np.ndarray, cut: np.ndarray, supplies: Sequence[Supply]) -> list[int]:
    """Families that lose units, the one whose last unit went last (so is the most important) first."""
    last = {}
    seen = np.zeros(len(supplies), np.int64)
    for position, f in enumerate(order.tolist()):
        seen[f] += 1
        if seen[f] == cut[f]:
            last[f] = position
    return sorted(last, key=lambda f: -last[f])
