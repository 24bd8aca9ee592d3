"""Transfer: what is found on one model, tried on another.

Zhao et al. 2018, "To compress or not to compress: understanding the interactions between adversarial attacks and neural
network compression", https://arxiv.org/abs/1810.00208.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_compress.audits.attacks import goals
from lightning_compress.audits.attacks.oracle import Logits, Oracle


@dataclass(frozen=True)
class Transfers:
    """What became of every example for every pair of models.

    Args:
        robust: (source, target) -> bool (N,): whether the target is right at the point found on the source.
        points: source -> points (N, ...).
    """

    robust: dict[tuple[str, str], Tensor]
    points: dict[str, Tensor]

    def rate(self, source: str, target: str) -> float:
        """Robust accuracy of a target to what was found on a source."""
        return float(self.robust[source, target].double().mean())


def transfer_matrix(
    sources: Mapping[str, Logits | Oracle],
    targets: Mapping[str, Logits | Oracle],
    x: Tensor,
    y: Tensor,
    attack: Callable[[Logits | Oracle, Tensor, Tensor], Tensor],
) -> Transfers:
    """Attack each source, and try what was found on each target.

    Args:
        sources: Differentiable models by name.
        targets: Models by name; a model may be both.
        x: Raw inputs (N, ...).
        y: Labels (N,).
        attack: (logits, x, y) -> points; one with ``stop=False`` goes beyond the boundary and transfers better.

    Example:
        >>> import functools, torch
        >>> from lightning_compress.audits.attacks import example_seeds, pgd
        >>> from lightning_compress.audits.handles import InputSpace
        >>> nets = {"dense": torch.nn.Linear(3, 2), "deployed": torch.nn.Linear(3, 2)}
        >>> attack = functools.partial(pgd, eps=0.1, space=InputSpace(0.0, 1.0), seeds=example_seeds([0]), stop=False)
        >>> found = transfer_matrix(nets, nets, torch.full((1, 3), 0.5), torch.tensor([0]), attack)
        >>> len(found.robust)
        4
    """
    points = {name: attack(logits, x, y) for name, logits in sources.items()}
    robust = {
        (source, target): ~goals.misclassified(Oracle.of(logits)(found), y)
        for source, found in points.items()
        for target, logits in targets.items()
    }
    return Transfers(robust, points)
