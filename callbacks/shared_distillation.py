"""Shared learning: networks, or branches on one trunk, that learn from their ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress.callbacks import peering
from lightning_compress.callbacks.company import Company, Export
from lightning_compress.callbacks.mutual import Peers
from lightning_compress.distillation import ensembles
from lightning_compress.distillation.branches import Gate, Trunk, check_heads, make_branches, pooled
from lightning_compress.distillation.branching import Branches, BranchSource
from lightning_compress.distillation.cohort import MODES, Mode, Shared
from lightning_compress.distillation.company import CompanySource, PeerSource
from lightning_compress.distillation.peers import seed_of
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.probe import from_example_inputs
from lightning_compress.schedule import Scheduled
from lightning_compress.targets import get_submodule_clean

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator


class SharedDistillation(Company):
    """Trains several networks, or several heads on one trunk, that learn from their ensemble.

    With `heads` it is ONE (Lan et al. 2018): the named modules exist once for each branch, everything before them is
    computed once, and a gate on the trunk's features weighs the branches' answers. With `peers` it is KDCL (Guo et al.
    2020): separate networks, and an ensemble that the labels choose. Each network or branch learns the user's task by
    the user's own ``training_step``, and ``weight * T^2 * KL(ensemble || its own answer)``; the gated ensemble learns
    the task too, which trains the gate. What was added is gone from the module when the fit has ended.

    KDCL shows each network another distortion of an image; here all see the same.

    Args:
        heads: Names, below the student, of the modules that each branch has for itself, such as
            ``["layer4", "fc"]``. Copies are drawn anew.
        branches: How many branches there are in all, yours among them, at least 2; only with `heads`.
        peers: Instead of `heads`: other networks, as for `MutualDistillation`.
        ensemble: ``"gate"`` (with `heads` only), ``"mean"`` of logits, ``"naive"`` (the network with the smallest loss
            for the sample), ``"linear"`` (the best combination for the sample), ``"minlogit"`` (for each class the
            smallest logit relative to the label's), or ``"general"`` (weights by the errors in the last validation).
            Default: ``"gate"`` with `heads`, else ``"minlogit"``.
        weight: Factor of what is learned from the ensemble, >= 0. In a step where it is 0 nothing else is run.
        temperature: ``T`` > 0; 3 in ONE.
        labels: Where the labels are in a batch: position or key; for ensembles that labels choose.
        student: As for `MutualDistillation`.
        class_dim: Where the classes are.
        example_inputs: Arguments of the student for a small batch, by which the gate is sized; default
            ``example_input_array``.
        export: As for `MutualDistillation`.
        monitor: As for `MutualDistillation`.
        mode: As for `MutualDistillation`.
        seed: Of what is drawn anew.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range, or both or none of `heads` and `peers` are given.

    Example:
        >>> from lightning_compress.callbacks import SharedDistillation
        >>> SharedDistillation(heads=["layer4", "fc"], branches=3).ensemble
        'gate'
        >>> SharedDistillation(peers=2, ensemble="linear").count
        2
    """

    def __init__(
        self,
        heads: Sequence[str] | None = None,
        branches: int = 3,
        peers: Peers | None = None,
        ensemble: Mode | None = None,
        weight: float | Scheduled = 1.0,
        temperature: float | Scheduled = 3.0,
        labels: int | str = 1,
        student: str | None = None,
        class_dim: int = 1,
        example_inputs: Any = None,
        export: Export = "main",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, student, export, monitor, mode, seed, name)
        if (heads is None) == (peers is None):
            raise ValueError(
                f"give heads (branches on one trunk) or peers (whole networks), one of the two; got heads={heads!r}, "
                f"peers={peers!r}"
            )
        self.ensemble = ensemble or ("gate" if heads is not None else "minlogit")
        if self.ensemble not in MODES:
            raise ValueError(f"ensemble is one of {MODES}; got {ensemble!r}")
        if self.ensemble == "gate" and heads is None:
            raise ValueError(
                "ensemble='gate' weighs branches by the features of their trunk, which separate networks do not have; "
                "give heads=, or another ensemble"
            )
        if isinstance(heads, str) or not all(isinstance(head, str) and head for head in heads or ()):
            raise TypeError(f"heads is a list of names of modules, such as ['fc']; got {heads!r}")
        if heads is not None and not heads:
            raise ValueError("heads is empty; name the modules that each branch has for itself")
        if isinstance(branches, bool) or not isinstance(branches, int) or branches < 2:
            raise ValueError(f"branches counts yours too, so it is at least 2; got {branches!r}")
        if peers is not None:
            peering.check_type(peers)
        if isinstance(labels, bool) or not isinstance(labels, int | str):
            raise TypeError(f"labels is a position in the batch or a key of it; got {labels!r}")
        self.heads, self.branches, self.peers, self.labels = heads, branches, peers, labels
        self.temperature, self.class_dim, self.example_inputs = temperature, class_dim, example_inputs
        self._term(lambda shapes: nn.Identity())  # refuses what is out of range

    def _term(self, make: Any) -> Shared:
        return Shared(self.ensemble, self.labels, make, self.temperature, self.weight, self.class_dim)

    @property
    def count(self) -> int:
        """How many networks or branches there are besides the student's."""
        return self.branches - 1 if self.heads is not None else peering.count_of(self.peers)

    @property
    def observes(self) -> bool:
        """Whether answers in validation are wanted."""
        return self.ensemble == "general"

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        super().check(run)
        structural = [t.name for t in run.techniques if t.changes_structure]
        if self.heads is not None and structural:
            raise CompressionError(
                f"{self.name}: branches share the trunk that {structural[0]} would change, and their heads could not "
                "follow. Train with branches first and cut in a second fit, or use peers="
            )
        if self.observes and not callable(getattr(type(run.pl_module), "validation_step", None)):
            raise CompressionError(f"{self.name}: ensemble='general' measures errors in validation_step; define one")

    def make_source(self, run: Coordinator, student: str) -> CompanySource:
        """See `Company.make_source`."""
        if self.heads is None:
            term = self._term(lambda shapes: peering.build(self, run, self.peers, student))
            return PeerSource(self.name, run.pl_module, student, term, self.quiet(run))
        network = get_submodule_clean(run.pl_module, student, keep_wrappers=True)
        check_heads(self.name, network, self.heads)
        term = self._term(lambda shapes: self._build(run, student))
        return BranchSource(self.name, run.pl_module, student, term, self.quiet(run), heads=self.heads)

    def _build(self, run: Coordinator, student: str) -> Branches:
        assert self.heads is not None
        root = self.unedited(run)
        network = get_submodule_clean(root, student, keep_wrappers=True)
        made = make_branches(root, network, self.heads, self.branches - 1, self.seed, self.name)
        gate = None
        if self.ensemble == "gate":
            width = self._width(network, getattr(root, "example_input_array", None))
            with isolated_rng(seed_of(self.name, self.seed, "gate")):
                gate = Gate(width, self.branches)
        return Branches(made, gate)

    @torch.no_grad()
    def _width(self, network: nn.Module, example: Any) -> int:
        """Channels of the trunk's features, from an example call of a copy of the network."""
        assert self.heads is not None
        example = self.example_inputs if self.example_inputs is not None else example
        if example is None:
            raise CompressionError(
                f"{self.name}: the gate's size depends on the trunk's features; pass example_inputs= (the student's "
                "arguments for a small batch) or define `example_input_array`"
            )
        trunk = Trunk(network, self.heads)
        like = next(network.parameters())
        try:
            trunk.start()
            from_example_inputs(example).to(like.device).run(network)
            trunk.stop()
            trunk.replays()  # refuses heads that were not called
            features = trunk.features[0]
        finally:
            trunk.close()
        if features is None or features.dim() < 2:
            shape = None if features is None else tuple(features.shape)
            raise CompressionError(
                f"{self.name}: the first head gets {shape}, and the gate weighs features (B, C), (B, C, H, W) or "
                "(B, L, C); use ensemble='mean'"
            )
        return int(pooled(features).shape[1])

    def pairs(self, source: CompanySource, number: int) -> dict[str, str]:
        """See `Company.pairs`."""
        if self.heads is None:
            return peering.pairs(source, number)
        below = f"{source.student}." if source.student else ""
        branch = f"{source.child}.branches.{number - 1}"
        return {f"{branch}.{i}": f"{below}{head}" for i, head in enumerate(self.heads)}

    def start(self, run: Coordinator) -> None:
        """See `CompressionCallback.start`."""
        super().start(run)
        latest = run.decisions.find(f"{self.name}/weights")
        if latest is not None:
            self._use(latest.outcome)

    def decide(self, run: Coordinator, products: Tensor) -> None:
        """Weights of the ensemble until the next validation."""
        weights = run.adapter.decide(lambda: ensembles.general_weights(products).tolist())
        run.decisions.record(run.step, f"{self.name}/weights", weights)
        rank_zero_info(f"{self.name}: weights of the networks by their errors: {[round(w, 4) for w in weights]}")
        self._use(weights)

    def _use(self, weights: Sequence[float]) -> None:
        assert self._source is not None
        term: Any = self._source.term
        term.weights = list(weights)
