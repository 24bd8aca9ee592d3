"""Pruning with masks during a fit: unstructured, N:M, rows, columns, filters and blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress.callbacks import interplay
from lightning_compress.callbacks.base import MASKS, CompressionCallback
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.errors import CompressionError
from lightning_compress.pruning import patterns
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.masks import parameter_name
from lightning_compress.pruning.threshold import magnitude_keep_masks
from lightning_compress.schedule import Schedule
from lightning_compress.targets import as_patterns, select

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_compress.callbacks.coordinator import Coordinator

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
KINDS = (nn.Linear, *CONVOLUTIONS)
# Their updates depend on norms over whole tensors, in which gradients of masked weights would count.
_NORM_OPTIMIZERS = {"LAMB", "Lamb", "LARS", "Lars", "Adafactor", "Muon"}


class Pruning(CompressionCallback):
    """Prunes weights by magnitude while the model trains; the pruned weights stay exactly zero.

    At each event of the schedule the weights of smallest magnitude are masked, until `sparsity` is reached (Zhu &
    Gupta 2017, "To prune, or not to prune"). The threshold is the exact k-th smallest value; no weights are gathered
    or concatenated for unstructured masks. Masks are kept outside of the module: parameter names never change, a
    checkpoint loads strictly into the user's own class, and it resumes exactly.

    What it buys: a smaller file after compression of the zeros, and a base for sparse kernels. Zeros do not make
    ordinary dense kernels faster; for that, use `ChannelPruning`.

    Args:
        sparsity: Final share of zeros among the targeted weights, in (0, 1); the weights that exist at the moment
            count, so a channel cut in the same fit does not disturb it. For ``"N:M"`` it defaults to ``1 - N/M``.
        pattern: ``"unstructured"``; ``"N:M"`` (N of M consecutive input weights are kept, such as ``"2:4"``);
            ``"row"`` or ``"column"`` (output or input units of Linear layers), ``"filter"`` (output channels of
            convolutions), ``"block:RxC"``.
        scope: ``"global"`` compares all targeted weights; ``"local"`` gives each layer the same sparsity.
        schedule: When to act; events are optimizer steps.
        mode: ``"hard"`` zeroes the weights after each optimizer step. ``"soft"`` keeps the values, multiplies by the
            mask in the forward pass and decides anew at each event, so that a weight can come back; the zeros are
            written at the end of the fit.
        targets: Name patterns or types of the layers to prune.
        exclude: Name patterns or types to leave out.
        mask_gradients: Zero the gradients of masked weights before clipping: ``"auto"`` does so where they could
            matter (gradient clipping, manual optimization, optimizers that use norms).
        reset_monitors: At an event, EarlyStopping and ModelCheckpoint judge anew; the dense model's best files stay.
        hold_early_stopping: Keep EarlyStopping from judging before the last event.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_compress import Schedule
        >>> from lightning_compress.callbacks import Pruning
        >>> Pruning(sparsity=0.9, schedule=Schedule(begin="10%", end="60%", every="1 epoch")).sparsity
        0.9
    """

    order = MASKS

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        scope: Literal["global", "local"] = "global",
        schedule: Schedule = Schedule(begin="10%", end="50%", every="1 epoch"),  # noqa: B008 - frozen
        mode: Literal["hard", "soft"] = "hard",
        targets: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        mask_gradients: bool | Literal["auto"] = "auto",
        reset_monitors: bool = True,
        hold_early_stopping: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name, schedule)
        self.pattern = patterns.parse(pattern)
        if sparsity is None and self.pattern.kind == "n:m":
            sparsity = self.pattern.most
        if not isinstance(sparsity, (int, float)) or isinstance(sparsity, bool) or not 0 < sparsity < 1:
            raise ValueError(
                f"sparsity is the share of weights to remove, strictly between 0 and 1 (0.9 removes 90 %); "
                f"got {sparsity!r}"
            )
        if sparsity > self.pattern.most:
            raise ValueError(f"pattern {self.pattern} removes at most {self.pattern.most:g}; got sparsity={sparsity!r}")
        for argument, value, known in (("scope", scope, ("global", "local")), ("mode", mode, ("hard", "soft"))):
            if value not in known:
                raise ValueError(f"{argument} is one of {known}; got {value!r}")
        if mask_gradients not in (True, False, "auto"):
            raise ValueError(f"mask_gradients is True, False or 'auto'; got {mask_gradients!r}")
        if schedule is None:
            raise TypeError("schedule says when to prune, such as Schedule(begin=0, curve='constant'); got None")
        as_patterns("targets", targets)
        as_patterns("exclude", exclude)
        self.sparsity, self.scope, self.mode = float(sparsity), scope, mode
        self.targets, self.exclude = targets, exclude
        self.mask_gradients = mask_gradients
        self.reset_monitors, self.hold_early_stopping = reset_monitors, hold_early_stopping

    # ------------------------------------------------------------------------------------------------------ life
    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self._edits: int | None = None

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        run.adapter.require("masks, mid-fit", self.name)

    def at_setup(self, run: Coordinator) -> None:
        """Let the targeted layers compute with masked weights, before anything is wrapped."""
        modules = self._layers(run)
        self._check_weights(modules)
        if self.mode == "soft":
            run.masking.attach_soft(modules)

    def start(self, run: Coordinator) -> None:
        """See `CompressionCallback.start`."""
        if self._edits is None:
            self._edits = run.edits
        run.adapter.check_sharding(self._weights(run))
        assert self.resolved is not None
        lazy = any(_is_lazy(module.weight) for module in self._layers(run).values())
        if set(self.resolved.events) - set(self.done) and not lazy:
            # What cannot be met shows now, not after half of the training.
            run.adapter.in_step(lambda: self._new_masks(run, self.sparsity))
        kept = self._spared(run)
        if kept:
            rank_zero_info(f"{self.name}: the last layer {kept!r} keeps all its outputs")

    def event(self, run: Coordinator, step: int) -> None:
        """Mask anew for the sparsity of this step."""
        assert self.resolved is not None
        if self.mode == "soft":  # layers that an edit brought are as new to masks as all were at setup
            soft = run.masking.store.soft
            run.masking.attach_soft({n: m for n, m in self._layers(run).items() if n not in soft})
        self._mask(run, step, self.resolved.value(step, 0.0, self.sparsity, run.decisions.of(self.name)))

    def boundary(self, run: Coordinator, step: int) -> None:
        """After a structural edit other weights exist: keep the sparsity what it should be."""
        if run.edits != self._edits:
            if self.done:
                self.event(run, step)
            self._edits = run.edits

    def before_optimizer_step(self, run: Coordinator, optimizer: Optimizer) -> None:
        """Zero the gradients of masked weights where they could matter."""
        if len(run.masking) and self._masks_gradients(run, optimizer):
            run.masking.mask_gradients()

    def finish(self, run: Coordinator) -> None:
        """Write the zeros of soft masks."""
        if self.mode == "soft":
            run.masking.harden()
        if self.resolved is not None and set(self.resolved.events) - set(self.done):
            reached = self._sparsity_of(run)
            rank_zero_info(
                f"{self.name}: the fit ended before the last event; sparsity {self.sparsity:.4f} was asked, "
                f"{reached:.4f} reached"
            )

    def state_dict(self) -> dict[str, Any]:
        """How many structural edits the masks know of: a file may lie between a cut and the masks that follow it."""
        return {**super().state_dict(), "edits": self._edits}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._edits = state_dict.get("edits")

    # --------------------------------------------------------------------------------------------------- masking
    def _check_weights(self, modules: Mapping[str, nn.Module]) -> None:
        ready: dict[str, Any] = {n: m.weight for n, m in modules.items() if not _is_lazy(m.weight)}
        whole = [f"{name!r} ({weight.dtype})" for name, weight in ready.items() if not weight.is_floating_point()]
        if whole:
            raise CompressionError(
                f"{self.name}: {', '.join(whole)} holds no floating-point numbers (quantized?), whose magnitude says "
                "how much a weight matters; prune before quantizing, or name these layers in exclude="
            )
        if ready and len(ready) == len(modules) and not any(weight.numel() for weight in ready.values()):
            raise CompressionError(
                f"{self.name}: the targeted weights ({', '.join(ready)}) are all empty, so there is nothing to prune; "
                "target other layers"
            )

    def _layers(self, run: Coordinator) -> dict[str, nn.Module]:
        chosen = select(run.pl_module, self.targets, self.exclude, kinds=self._kinds)
        named = {parameter_name(run.pl_module, module): module for module in chosen.values()}
        named.pop(self._spared(run) or "", None)
        if not named:
            raise CompressionError(
                f"{self.name}: nothing is left to prune: pattern {self.pattern} spares the outputs of the last layer, "
                "and there is no other layer that it applies to; name layers in targets= if their outputs may go"
            )
        return named

    @property
    def _kinds(self) -> tuple[type[nn.Module], ...]:
        """Types of layers that have what the pattern removes: rows are of Linear, filters of convolutions."""
        return {"row": (nn.Linear,), "filter": CONVOLUTIONS}.get(self.pattern.kind, KINDS)

    def _spared(self, run: Coordinator) -> str | None:
        # Output units of the model's last layer are its outputs: classes, boxes. They go only if the user names them.
        if self.pattern.kind not in ("row", "filter") or tuple(self.targets) != ("*",):
            return None
        last = list(select(run.pl_module, kinds=KINDS).values())[-1]
        return parameter_name(run.pl_module, last) if isinstance(last, self._kinds) else None

    def _weights(self, run: Coordinator) -> dict[str, nn.Parameter]:
        parameters = run.adapter.parameters(run.pl_module)
        return {name: parameters[name] for name in self._layers(run)}

    def _mask(self, run: Coordinator, step: int, sparsity: float) -> None:
        with run.timed() as seconds:
            before = run.masking.densities()
            first = not run.is_changed
            masks, whole = run.adapter.in_step(lambda: self._new_masks(run, sparsity))
            run.masking.commit(masks, whole, self.name)
            kept = interplay.reset_monitors(run.trainer, first) if self.reset_monitors else []
            after = run.masking.densities()
            changes = [{"name": n, "before": before.get(n, 1.0), "after": after[n]} for n in masks]
            record = EventRecord(
                step=step, epoch=run.trainer.current_epoch, technique="Pruning", name=self.name,
                asked={"sparsity": sparsity}, reached={"sparsity": self._sparsity_of(run)},
                layers=changes, notes=[f"the best file before the masks stays: {path}" for path in kept],
                seconds=seconds(),
            )  # fmt: skip
        run.emit(record)

    def _new_masks(self, run: Coordinator, sparsity: float) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        """New local masks, and whole ones where they are at hand."""
        weights = self._weights(run)
        lazy = next((name for name, weight in weights.items() if _is_lazy(weight)), None)
        if lazy is not None:
            raise CompressionError(
                f"{self.name}: {lazy!r} has no shape yet, because its lazy module has not run; begin the schedule "
                "after the first step, or run a batch through the model before `fit`"
            )
        names = list(weights)
        already = [None if self.mode == "soft" else run.masking.store.local.get(n) for n in names]
        if self.pattern.kind == "unstructured":
            local = [run.adapter.local(p) for p in weights.values()]
            keep = self._unstructured(run, local, sparsity, already, names)
            return dict(zip(names, keep, strict=True)), {}
        return self._structured(run, names, sparsity)

    def _unstructured(
        self, run: Coordinator, local: list[Tensor], sparsity: float, already: list[Tensor | None], names: list[str]
    ) -> list[Tensor]:
        ranks = run.adapter.ranks()
        groups = [range(len(local))] if self.scope == "global" else [[i] for i in range(len(local))]
        keep: list[Tensor] = []
        for group in groups:
            total = int(ranks.reduce(torch.tensor(sum(local[i].numel() for i in group)), "sum"))
            keep += magnitude_keep_masks(
                [local[i] for i in group], round(sparsity * total), ranks, already=[already[i] for i in group],
                names=[names[i] for i in group],
            )  # fmt: skip
        return [k if m is None else k & m for k, m in zip(keep, already, strict=True)]

    def _structured(
        self, run: Coordinator, names: list[str], sparsity: float
    ) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        """Patterns see whole weights: a shard need not hold whole rows, filters or groups."""
        modules = self._layers(run)
        dims = [1 if isinstance(modules[n], _TRANSPOSED) else 0 for n in names]
        earlier = run.adapter.gather(
            run.pl_module, {n: run.masking.store.local[n] for n in names if n in run.masking.store.local}
        )
        already = [None if self.mode == "soft" else earlier.get(n) for n in names]
        with run.adapter.summoned(run.pl_module) as whole:
            scores = [magnitude(whole[n]) for n in names]
        if self.scope == "global":
            keep = patterns.global_keep_masks(scores, self.pattern, sparsity, already, out_dims=dims, names=names)
        else:
            rows = zip(scores, already, dims, names, strict=True)
            keep = [patterns.pattern_keep_mask(s, self.pattern, sparsity, a, out_dim=d, name=n) for s, a, d, n in rows]
        full = dict(zip(names, keep, strict=True))
        return run.adapter.shard(run.pl_module, full), full

    def _sparsity_of(self, run: Coordinator) -> float:
        sizes = {n: (math.prod(p["shape"]), int(p["kept"])) for n, p in run.packed_masks().items()}
        names = [n for n in self._layers(run) if n in sizes]
        total = sum(sizes[n][0] for n in names)
        return 1 - sum(sizes[n][1] for n in names) / total if total else 0.0

    def _masks_gradients(self, run: Coordinator, optimizer: Optimizer) -> bool:
        if self.mask_gradients != "auto":
            return bool(self.mask_gradients)
        return (
            run.trainer.gradient_clip_val is not None
            or not run.pl_module.automatic_optimization
            or is_overridden("configure_gradient_clipping", run.pl_module)
            or type(optimizer).__name__ in _NORM_OPTIMIZERS
        )


def _is_lazy(weight: Any) -> bool:
    return bool(is_lazy(weight))
