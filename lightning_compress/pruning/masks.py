"""The one store of masks: which weights are kept, how that is enforced, carried through edits, and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress import layers
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.applying import zero_masked_
from lightning_compress.pruning.packing import pack
from lightning_compress.surgery import Journal, Swap
from lightning_compress.targets import clean_name, named_modules_clean

TRANSFORM = "mask"


class SoftMask:
    """The weight transform ``w * mask``; values of masked weights are kept for later.

    Args:
        mask: Boolean, of the whole weight's shape; ``None`` keeps everything.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask

    def __call__(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        if self.mask is None:
            return weight
        if self.mask.device != weight.device:
            self.mask = self.mask.to(weight.device)
        return weight * self.mask


class MaskStore:
    """Masks by clean parameter name, as this process holds them (whole, or the part of its shard).

    Hard masks zero the weights after each optimizer step. Soft masks leave the stored values alone and multiply inside
    the forward pass (`SoftMask`); `harden` makes them hard.
    """

    def __init__(self) -> None:
        self.local: dict[str, Tensor] = {}
        self.soft: dict[str, nn.Module] = {}
        self._held: tuple[list[Tensor], list[Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.local)

    def set(self, name: str, mask: Tensor, whole: Tensor | None = None) -> None:
        """Put a mask in place of the one that is there.

        Args:
            name: Clean parameter name.
            mask: Boolean, of the shape of the local part.
            whole: Soft masks: the mask of the whole weight, for the forward pass; default `mask`.
        """
        self.local[name] = mask
        self._held = None
        if name in self.soft:
            layers.add_transform(self.soft[name], TRANSFORM, SoftMask(mask if whole is None else whole))

    def hold(self, parameters: Mapping[str, Tensor]) -> None:
        """Remember the local tensors to zero, once after each change of masks or parameters.

        Args:
            parameters: Local tensors by clean name, sharing the memory of the trained parameters.
        """
        hard = [(parameters[n], m) for n, m in self.local.items() if n not in self.soft and m.numel()]
        self._held = ([p for p, _ in hard], [m for _, m in hard])

    def forget(self) -> None:
        """Drop the remembered tensors, because parameters were replaced."""
        self._held = None

    @property
    def holds(self) -> bool:
        """Whether `apply` knows the tensors to zero."""
        return self._held is not None

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the masked weights, in place."""
        if self._held is None:
            raise CompressionError("masks were applied before `hold`; this is a bug in lightning-compress")
        for weight, mask in zip(*self._held, strict=True):
            zero_masked_(weight, mask)

    @torch.no_grad()
    def apply_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Zero the masked elements of other tensors of the same names: gradients, momentum, an averaged copy."""
        for name, mask in self.local.items():
            tensor = tensors.get(name)
            if tensor is not None and tensor.shape == mask.shape and name not in self.soft:
                tensor.mul_(mask.to(tensor.device))

    @torch.no_grad()
    def zero_momentum(self, optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor]) -> None:
        """Zero the optimizer state of masked weights, so that old momentum does not move anything.

        Args:
            optimizers: The optimizers.
            parameters: The trained parameter objects by clean name.
        """
        for optimizer in optimizers:
            for name, mask in self.local.items():
                if name in self.soft or name not in parameters or parameters[name] not in optimizer.state:
                    continue
                for value in optimizer.state[parameters[name]].values():
                    part = value.to_local() if hasattr(value, "to_local") else value
                    if isinstance(part, Tensor) and part.shape == mask.shape and part.dim():
                        part.mul_(mask)

    @torch.no_grad()
    def harden(self, parameters: Mapping[str, Tensor]) -> None:
        """Write the zeros of soft masks into the weights; the layers get their own classes back."""
        for name, module in self.soft.items():
            layers.remove_transform(module, TRANSFORM)
            if name in self.local:
                parameters[name].mul_(self.local[name])
        self.soft.clear()
        self._held = None

    # ---------------------------------------------------------------------------------------------------- following
    def follow(self, swaps: Sequence[Swap], journal: Journal) -> None:
        """Take over an edit: a sliced weight's mask is sliced, a new kind of parameter starts unmasked."""
        soft = {name: (module, layers.get_transform(module, TRANSFORM)) for name, module in self.soft.items()}
        local = dict(self.local)
        journal.on_undo(lambda: self._restore(local, soft))
        for swap in swaps:
            if all(new.name != swap.name for new in swap.new):
                self.soft.pop(swap.name, None)  # its layer is gone
            mask = self.local.pop(swap.name, None)
            if mask is None:
                continue
            for new in swap.new:
                if new.state_map is not None and mask.shape == swap.old.shape:
                    self.set(new.name, new.state_map(mask))
        self._held = None

    def _restore(self, local: dict[str, Tensor], soft: Mapping[str, tuple[nn.Module, Any]]) -> None:
        self.local, self._held = local, None
        self.soft = {name: module for name, (module, _) in soft.items()}
        for module, transform in soft.values():
            if transform is not None:
                layers.add_transform(module, TRANSFORM, transform)

    # ------------------------------------------------------------------------------------------------------- saving
    def packed(self, gather: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Any]:
        """Bit-packed whole masks by name: what a checkpoint holds.

        Args:
            gather: Makes whole masks from local ones; a collective when parameters are sharded.
        """
        return {name: pack(mask) for name, mask in gather(self.local).items()}


def parameter_name(root: nn.Module, module: nn.Module, attribute: str = "weight") -> str:
    """The clean full name of a module's parameter: that of its first owner if it is tied.

    Raises:
        CompressionError: If it is no parameter but computed anew from others.
    """
    wanted = getattr(module, attribute)
    found = next((clean_name(name) for name, p in root.named_parameters() if p is wanted), None)
    if found is None:
        owner = next((name for name, m in named_modules_clean(root) if m is module), type(module).__name__)
        raise CompressionError(
            f"the {attribute} of {owner!r} is computed from other parameters (weight_norm, another parametrization, "
            "torch.nn.utils.prune), so zeros in it would not stay; make it plain first "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove), or exclude the layer"
        )
    return found
