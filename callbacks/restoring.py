"""Bringing the module to a checkpoint's structure and masks, early enough under every strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_compress import manifest, surgery
from lightning_compress.callbacks.strategies import is_trusted
from lightning_compress.errors import CompressionError

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator


def replay(run: Coordinator, path: str) -> None:
    """At setup, before anything is wrapped: make the edits that the checkpoint has and the module lacks.

    Args:
        run: The coordinator.
        path: The checkpoint that the stage was asked to load.

    Raises:
        CompressionError: If it cannot be read, does not fit, or the model was sharded before this moment.
    """
    found = manifest.read(path, weights_only=not is_trusted(run.trainer)) or {}
    recorded = found.get("edits", [])
    sharded = any(hasattr(p, "device_mesh") for p in run.pl_module.parameters())
    if sharded and len(recorded) > len(manifest.edits_of(run.pl_module)):
        raise CompressionError(
            "the model was sharded in `configure_model` before the structure of the checkpoint could be restored; "
            "call `lightning_compress.materialize(self.model)` right before `fully_shard`"
        )
    _replay(run, found)
    if run.stage != "fit" and run.adapter.is_sharded:  # once sharded, layers cannot be given masks
        run.masking.packed = dict(found.get("masks") or {})
        run.masking.attach_packed()


def load(run: Coordinator, checkpoint: dict[str, Any]) -> None:
    """Before the weights of a checkpoint are loaded: check the structure, take the masks, match helper modules.

    Args:
        run: The coordinator.
        checkpoint: What Lightning read; its state dicts are completed in place.

    Raises:
        CompressionError: If the structure does not fit.
    """
    recorded = checkpoint.get(manifest.KEY) or {}
    if run.adapter.is_sharded:
        have = manifest.of(run.pl_module)["edits"]
        if not manifest.equal(list(recorded.get("edits", [])), have):
            raise CompressionError(
                "this strategy loads weights after sharding, and the structure of the checkpoint was not known at "
                "setup; set `trainer.ckpt_path = path` before `fit`, or pass ckpt_path= to it"
            )
    else:
        _replay(run, recorded)
        manifest.check_masks(run.pl_module, recorded)
    run.masking.packed = dict(recorded.get("masks") or {})
    _match_helpers(run, checkpoint)
    _say_warm_starts(run, checkpoint)


def _replay(run: Coordinator, recorded: Mapping[str, Any]) -> None:
    """Make the edits that the module lacks; one by one, if some may have to be undone alone."""
    if run.undoing is not None and run.setup_journal is not None:
        edits = recorded.get("edits", [])
        for count in range(len(manifest.edits_of(run.pl_module)), len(edits)):
            journal = surgery.Journal()
            manifest.replay(run.pl_module, {**recorded, "edits": edits[: count + 1]}, journal)
            run.setup_journal.on_undo(journal.undo)
            run.undoing.append((range(count, count + 1), journal))
    manifest.replay(run.pl_module, recorded, run.setup_journal)


def _match_helpers(run: Coordinator, checkpoint: dict[str, Any]) -> None:
    """Helper modules that only one side has are no reason to refuse."""
    own = {k: v for k, v in run.pl_module.state_dict().items() if k not in manifest.without_auxiliary({k: v})}
    for key in ("state_dict", "current_model_state"):
        if key in checkpoint:
            state = checkpoint[key]
            known = {k: v for k, v in state.items() if k in own}
            checkpoint[key] = manifest.without_auxiliary(state)
            checkpoint[key].update({k: known.get(k, v) for k, v in own.items()})


def _say_warm_starts(run: Coordinator, checkpoint: dict[str, Any]) -> None:
    known = checkpoint.get("callbacks")
    if run.stage != "fit" or known is None:
        return
    fresh = [t.name for t in run.techniques if t.state_key not in known]
    if fresh:
        rank_zero_info(f"lightning-compress: the checkpoint does not know {', '.join(fresh)}; they start afresh")
