"""Hooks put on the user's LightningModule instance: what a checkpoint holds, and when structure is made.

Lightning skips callback hooks when it saves weights only, and calls a callback's load hook after the weights are
loaded. The module's own two checkpoint hooks come at the right time, so the instance gets wrapped ones. All of them
are module-level callables that survive deepcopy and pickle; a copy of the module keeps its manifest but knows no
Trainer.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

from lightning_compress import manifest
from lightning_compress.callbacks.masking import is_zero
from lightning_compress.pruning.packing import unpack

if TYPE_CHECKING:
    from lightning import LightningModule

    from lightning_compress.callbacks.coordinator import Coordinator

MASKS = "_lc_masks"  # packed masks, left on the module when no fit is running


class _Hook:
    """An instance attribute that wraps a method of the module.

    Args:
        module: The LightningModule.
        name: The method.
        run: The coordinator of the running Trainer, held weakly.
    """

    def __init__(self, module: LightningModule, name: str, run: Coordinator | None) -> None:
        self.module = module
        self.name = name
        self.previous = module.__dict__.get(name)
        self._run = None if run is None else weakref.ref(run)

    @property
    def run(self) -> Coordinator | None:
        """The coordinator, while its fit lasts."""
        return None if self._run is None else self._run()

    @property
    def inner(self) -> Callable[..., Any]:
        """The method without this wrapper."""
        if self.previous is not None:
            return self.previous  # type: ignore[no-any-return]
        return functools.partial(getattr(type(self.module), self.name), self.module)

    @property
    def __code__(self) -> CodeType:  # Lightning compares code objects to see whether a hook is overridden
        return type(self).__call__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    def install(self) -> None:
        """Put the hook on the module instance."""
        self.module.__dict__[self.name] = self

    def remove(self) -> None:
        """Put back what was there; does nothing if it is not there any more."""
        if self.module.__dict__.get(self.name) is not self:
            return
        if self.previous is None:
            del self.module.__dict__[self.name]
        else:
            self.module.__dict__[self.name] = self.previous


class SaveHook(_Hook):
    """``on_save_checkpoint``: writes the manifest and the masks, also into weights-only files.

    Args:
        module: The LightningModule.
        name: The method.
        run: The coordinator of the running Trainer.
        unwritten: Parameters whose masks are not written into their values, since soft pruning was interrupted.
    """

    def __init__(
        self, module: LightningModule, name: str, run: Coordinator | None, unwritten: Sequence[str] = ()
    ) -> None:
        super().__init__(module, name, run)
        self.unwritten = frozenset(unwritten)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """See `LightningModule.on_save_checkpoint`."""
        self.inner(checkpoint)
        masks = self._masks_left(checkpoint) if self.run is None else self.run.packed_masks()
        checkpoint[manifest.KEY] = {**manifest.of(self.module), "masks": masks}
        if self.run is not None and "optimizer_states" not in checkpoint:
            self._leave_out(self.run, checkpoint)

    def _leave_out(self, run: Coordinator, checkpoint: dict[str, Any]) -> None:
        # Nobody trains on from weights alone, and other networks are as large as the model.
        names = tuple(f"{name}." for t in run.techniques for name in t.training_only(run))
        state = checkpoint.get("state_dict", {})
        for key in [key for key in state if names and key.startswith(names)]:
            del state[key]

    def _masks_left(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        # Weights that were trained on without a callback have grown back, and loading must not zero them again.
        state, masks = checkpoint.get("state_dict", {}), self.module.__dict__.get(MASKS, {})
        return {n: m for n, m in masks.items() if n in self.unwritten or n not in state or _in_force(state[n], m)}


def _in_force(weight: Any, packed: dict[str, Any]) -> bool:
    return hasattr(weight, "to_local") or is_zero(weight, unpack(packed))


class LoadHook(_Hook):
    """``on_load_checkpoint``: brings the module to the checkpoint's structure before the weights are loaded."""

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """See `LightningModule.on_load_checkpoint`."""
        if self.run is not None:
            self.run.on_load(checkpoint)
        else:
            recorded = checkpoint.get(manifest.KEY) or {}
            manifest.replay(self.module, recorded)
            self.module.__dict__.pop(MASKS, None)
            if recorded.get("masks"):
                self.module.__dict__[MASKS] = dict(recorded["masks"])
        self.inner(checkpoint)


class SetupHook(_Hook):
    """``setup``: wraps ``configure_model`` only after every callback's setup.

    `WeightAveraging` calls ``configure_model`` in its own setup if it looks overridden, which would be too early for
    modules that build their layers in ``setup``.
    """

    def __call__(self, stage: str) -> None:
        """See `LightningModule.setup`."""
        self.remove()
        self.inner(stage=stage)
        if self.run is not None:
            self.run.add_hook(ConfigureHook(self.module, "configure_model", self.run))


class ConfigureHook(_Hook):
    """``configure_model``: at its end, the one place where setup-time structure is made."""

    def __call__(self) -> None:
        """See `LightningModule.configure_model`."""
        self.remove()
        if self.run is None:
            self.inner()
            return
        token = manifest._pending.set(self.run.materialize)
        try:
            self.inner()
        finally:
            manifest._pending.reset(token)
        self.run.materialize()
        self.run.after_configure_model()
