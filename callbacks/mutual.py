"""Deep mutual learning: networks that train in the same fit and learn from each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from lightning_compress.callbacks import peering
from lightning_compress.callbacks.company import Company, Export
from lightning_compress.distillation.cohort import Mutual
from lightning_compress.distillation.company import CompanySource, PeerSource
from lightning_compress.distillation.losses import check_temperature
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import numbers

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

Peer = nn.Module | Callable[[], nn.Module] | str
Peers = int | Sequence[Peer] | Peer
"""How many copies of the user's network, or what makes the others."""


class MutualDistillation(Company):
    """Trains other networks beside yours, and lets all learn from each other (Zhang et al. 2018, "DML").

    There is no teacher. Each of K networks learns the user's task by the user's own ``training_step``, and the answers
    of the others: ``task_i + weight / (K - 1) * sum over j of T^2 * KL(p_j || p_i)``. The other networks (peers) are
    part of the module and of the optimizer while the fit runs, each parameter in the group of the one that it mirrors,
    so with its learning rate and its schedule. All networks step together; the paper lets them step one after the
    other. When the fit has ended they are gone from the module, and weights-only files never have them.

    Args:
        peers: A number: copies of your network, drawn anew (frozen parts are kept). A module, a function that makes
            one, ``"package.module:function"``, or a list of these: a LightningModule of your class, or a network to
            stand in the student's place. A module is copied.
        weight: Factor of what networks learn from each other, >= 0; 1 in the paper. In a step where it is 0 the peers
            are not run.
        temperature: ``T`` > 0; 1 in the paper.
        student: Name of the part whose outputs are compared; default: the LightningModule if it defines ``forward``,
            else its only child with parameters.
        class_dim: Where the classes are.
        export: ``"main"``: your network stays. ``"best"``: at the end of the fit the one with the best `monitor` of
            the last validation takes its place, with its optimizer state; peers must be built as yours is.
        monitor: Name of a value that ``validation_step`` logs; every network makes that step too.
        mode: Whether less or more of it is better.
        seed: Of the peers' weights, the same in every process.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_compress.callbacks import MutualDistillation
        >>> MutualDistillation(peers=2, export="best", monitor="val_loss").count
        2
    """

    def __init__(
        self,
        peers: Peers = 1,
        weight: float | Scheduled = 1.0,
        temperature: float | Scheduled = 1.0,
        student: str | None = None,
        class_dim: int = 1,
        export: Export = "main",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, student, export, monitor, mode, seed, name)
        peering.check_type(peers)
        check_temperature(self.name, *numbers(self.name, "temperature", temperature))
        self.peers, self.temperature, self.class_dim = peers, temperature, class_dim
        Mutual(lambda shapes: nn.Identity(), temperature, weight, "mutual", class_dim)  # refuses what is out of range

    @property
    def count(self) -> int:
        """How many networks there are besides the student."""
        return peering.count_of(self.peers)

    def make_source(self, run: Coordinator, student: str) -> CompanySource:
        """See `Company.make_source`."""
        term = Mutual(
            lambda shapes: peering.build(self, run, self.peers, student), self.temperature, self.weight, "mutual",
            self.class_dim,
        )  # fmt: skip
        return PeerSource(self.name, run.pl_module, student, term, self.quiet(run))

    def pairs(self, source: CompanySource, number: int) -> dict[str, str]:
        """See `Company.pairs`."""
        return peering.pairs(source, number)
