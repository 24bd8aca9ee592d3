"""The masks of a running fit: installing, enforcing, and keeping them ready for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_compress import layers
from lightning_compress.callbacks import interplay
from lightning_compress.callbacks.signals import deferred_signals
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.masks import TRANSFORM, MaskStore, SoftMask
from lightning_compress.pruning.packing import pack, unpack
from lightning_compress.targets import clean_name

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from lightning_compress.callbacks.strategies import StrategyAdapter
    from lightning_compress.surgery import Journal


class Masking:
    """One store of masks for all techniques of a Trainer, under its strategy.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
        adapter: Reaches the parameters.
        packed: Bit-packed whole masks from an earlier fit.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, adapter: StrategyAdapter, packed: Mapping[str, Any]
    ) -> None:
        self.trainer, self.pl_module, self.adapter = trainer, pl_module, adapter
        self.store = MaskStore()
        self.packed: dict[str, Any] = dict(packed)
        self.commits = 0

    def __len__(self) -> int:
        return len(self.store)

    def attach_soft(self, modules: Mapping[str, nn.Module]) -> None:
        """Let layers compute with masked weights while their stored weights keep their values.

        Args:
            modules: Layers by the clean name of their weight.
        """
        for name, module in modules.items():
            if isinstance(module, layers.NonDynamicallyQuantizableLinear):
                raise CompressionError(
                    f"{name!r} is read by its attention layer, not called, so a soft mask of it would not be seen; "
                    "exclude it, or use mode='hard'"
                )
            layers.add_transform(module, TRANSFORM, SoftMask())
            self.store.soft[name] = module

    def attach_packed(self) -> None:
        """Let layers compute with the packed masks where the stored weights do not have their zeros."""
        for path, module in self.pl_module.named_modules():
            name = clean_name(f"{path}.weight")
            packed = self.packed.get(name)
            if packed is None or not layers.can_transform(module):
                continue
            mask = unpack(packed)
            if not is_zero(module.weight, mask):
                layers.add_transform(module, TRANSFORM, SoftMask(mask))
                self.store.soft[name] = module

    def finish(self) -> None:
        """Write the zeros of the soft masks of a fit that has no step left."""
        if self.packed and self.store.soft:
            self.install()
            self.harden()

    def detach_soft(self) -> None:
        """Give the layers their own classes back, without writing any zeros."""
        for module in self.store.soft.values():
            layers.remove_transform(module, TRANSFORM)

    def install(self) -> None:
        """Put the masks of a checkpoint or of an earlier fit in force."""
        if not self.packed:
            return
        whole = {name: unpack(packed) for name, packed in self.packed.items()}
        for name, part in self.adapter.shard(self.pl_module, whole).items():
            self.store.set(name, part, whole[name].to(self.adapter.device))
        self.apply()

    def rewind(self, packed: Mapping[str, Any]) -> None:
        """Put earlier masks in force, whose weights are in their places already.

        Args:
            packed: Bit-packed whole masks by clean name; what is missing is no longer masked.
        """
        self.store.local.clear()
        self.store.forget()
        for module in self.store.soft.values():
            layers.add_transform(module, TRANSFORM, SoftMask())
        self.packed = dict(packed)
        self.commits += 1
        self.install()

    def commit(self, local: Mapping[str, Tensor], whole: Mapping[str, Tensor], technique: str) -> None:
        """Put new masks in force on every rank, or on none.

        Args:
            local: New masks as this process holds them.
            whole: The same masks whole, where they are at hand; others are gathered.
            technique: For messages.

        Raises:
            CompressionError: On all ranks, if they disagree.
        """
        missing = {name: mask for name, mask in local.items() if name not in whole}
        full = {**whole, **self.adapter.gather(self.pl_module, missing)}
        packed = {name: pack(full[name]) for name in local}
        self.adapter.agree(packed, f"the masks of {technique}")
        with deferred_signals():
            self._put(local, full, packed)

    def _put(self, local: Mapping[str, Tensor], full: Mapping[str, Tensor], packed: Mapping[str, Any]) -> None:
        for name, mask in local.items():
            self.store.set(name, mask, full[name])
        self.packed = {**self.packed, **packed}
        self.commits += 1
        parameters = self.adapter.parameters(self.pl_module)
        self.store.zero_momentum(self.trainer.optimizers, parameters)
        self.apply()
        for average in interplay.averages(self.trainer):
            self.store.apply_to({clean_name(n): p.detach() for n, p in average.named_parameters()})

    def repack(self, journal: Journal) -> None:
        """Bring the packed masks up to date after an edit."""
        packed = self.store.packed(lambda local: self.adapter.gather(self.pl_module, local))
        journal.set_attribute(self, "packed", packed)

    def apply(self) -> None:
        """Zero the masked weights of the model."""
        if not self.store.holds:
            parameters = self.adapter.parameters(self.pl_module)
            self.store.hold({name: self.adapter.local(parameters[name]) for name in self.store.local})
        self.store.apply()

    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights."""
        parameters = self.adapter.parameters(self.pl_module)
        gradients = {n: parameters[n].grad for n in self.store.local if parameters[n].grad is not None}
        self.store.apply_to({n: self.adapter.local(g) for n, g in gradients.items() if g is not None})

    def harden(self) -> None:
        """Write the zeros of soft masks into the weights, of averaged copies too."""
        for average in interplay.averages(self.trainer):
            named = {clean_name(n): p.detach() for n, p in average.named_parameters()}
            for name, mask in self.store.local.items():
                named[name].mul_(mask.to(named[name].device))
        parameters = self.adapter.parameters(self.pl_module)
        self.store.harden({name: self.adapter.local(parameters[name]) for name in self.store.soft})

    def densities(self) -> dict[str, float]:
        """The share of kept weights of each masked parameter."""
        return {name: int(p["kept"]) / (math.prod(p["shape"]) or 1) for name, p in self.packed.items()}


def is_zero(weight: Any, mask: Tensor) -> bool:
    """Whether a weight is zero wherever its mask removes it; ``False`` if this process holds only a part of it."""
    if hasattr(weight, "to_local") or weight.shape != mask.shape:
        return False
    return not bool(weight.detach()[~mask.to(weight.device)].any())
