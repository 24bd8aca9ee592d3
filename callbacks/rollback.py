"""The model as it was before an event of compression: kept as plain data, and put back between two steps.

Structure goes back by the journals of the edits, whatever they were: cut channels, layers that were replaced,
quantizers that were switched on. What is kept beside them are values: of parameters and buffers, the state of the
optimizers, masks, and what the callbacks that compress remember. It is plain data, so that a checkpoint has it too;
a resumed run makes its edits anew, with their journals, and rolls back like one that was never stopped. Time does not
run backwards: steps, learning rates, random numbers and the place in the data go on.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_compress import manifest, surgery
from lightning_compress.callbacks import interplay
from lightning_compress.callbacks.base import FAKE_QUANT, CompressionCallback
from lightning_compress.callbacks.signals import deferred_signals
from lightning_compress.errors import CompressionError
from lightning_compress.targets import clean_name

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

Snapshot = dict[str, Any]
"""Plain data: what `take` returns."""


def compressing(run: Coordinator) -> list[CompressionCallback]:
    """The callbacks whose events change what the model computes."""
    return [technique for technique in run.techniques if technique.order <= FAKE_QUANT]


def take(run: Coordinator) -> Snapshot:
    """Keep the model and what belongs to it, as they are between two steps.

    Args:
        run: The coordinator.

    Raises:
        CompressionError: An optimizer trains a parameter that the module does not have.
    """
    module = run.pl_module
    # Rank 0 plans cuts alone and remembers more than the others; as after a resume, all go on with what it knows.
    remembered = run.adapter.broadcast({t.name: _remembered(t) for t in compressing(run)})
    return {
        "step": run.step,
        "edits": list(manifest.edits_of(module)),
        "tensors": {name: tensor.detach().clone() for name, _, _, tensor in _tensors(module)},
        "widths": {clean_name(path): found for path, part in module.named_modules() if (found := _widths(part))},
        "optimizers": _optimizers(run),
        "masks": dict(run.masking.packed),
        "techniques": remembered,
    }


def put_back(run: Coordinator, snapshot: Snapshot) -> None:
    """Make the model what it was, on every rank.

    Args:
        run: The coordinator.
        snapshot: From `take`, in this process or from a checkpoint of it.

    Raises:
        CompressionError: On all ranks, if they disagree, or if the module has other parameters by now.
    """
    run.adapter.agree([snapshot["step"], snapshot["edits"], snapshot["masks"]], "what to roll back to")
    with deferred_signals():
        later = _later_edits(run, snapshot)
        for optimizer in run.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        run.pl_module.zero_grad(set_to_none=True)
        for journal in later:
            journal.undo()
        _check_names(run, snapshot)
        _put_tensors(run.pl_module, snapshot)
        _put_optimizers(run, snapshot["optimizers"])
        run.masking.rewind(snapshot["masks"])
        for technique in compressing(run):
            done, own = list(technique.done), snapshot["techniques"].get(technique.name)
            if own is not None:
                technique.load_state_dict(copy.deepcopy({**own, "shared": {}}))
            technique.done = done  # what was rejected happened, and does not happen again
            technique.taken_back(run)
        for follower in (follower for technique in run.techniques for follower in technique.followers(run)):
            follower.follow([], surgery.Journal())  # hooks that a resumed run has put on what stood there
        if later:
            run.adapter.rewrap()
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()
        interplay.reset_monitors(run.trainer, False)


# -------------------------------------------------------------------------------------------------------------- parts
def _tensors(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Parameters and buffers where modules hold them: a tied one comes once for each owner."""
    for path, module in root.named_modules(remove_duplicate=False):
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None:
                    yield clean_name(f"{path}.{name}" if path else name), module, name, tensor


def _widths(module: nn.Module) -> dict[str, Any]:
    """Whole numbers that a layer knows of itself, such as ``out_channels`` or ``normalized_shape``."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (type(value) is int or (type(value) is tuple and _whole(value)))
    }


def _whole(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int for value in values)


def _remembered(technique: CompressionCallback) -> dict[str, Any]:
    state = technique.state_dict()
    state.pop("shared", None)  # the decisions of the run are not undone
    return copy.deepcopy(state)


def _optimizers(run: Coordinator) -> list[dict[str, Any]]:
    names = {id(p): clean_name(n) for n, p in run.pl_module.named_parameters()}
    kept = []
    for optimizer in run.trainer.optimizers:
        parameters = [[*group["params"]] for group in optimizer.param_groups]
        if any(id(p) not in names for group in parameters for p in group):
            raise CompressionError(
                f"{type(optimizer).__name__} trains a parameter that is no part of {type(run.pl_module).__name__}, so "
                "it would not be rolled back with the rest; make it a parameter of the module, or let the gate wait "
                "(action='pause')"
            )
        state = {names[id(p)]: _cloned(optimizer.state[p]) for g in parameters for p in g if p in optimizer.state}
        kept.append({"groups": [[names[id(p)] for p in group] for group in parameters], "state": state})
    return kept


def _cloned(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}


def forget_before(run: Coordinator, edits: int) -> None:
    """Keep no longer how to undo the first `edits` edits."""
    assert run.undoing is not None
    run.undoing[:] = [(places, journal) for places, journal in run.undoing if places.start >= edits]


def can_put_back(run: Coordinator, snapshot: Snapshot) -> bool:
    """Whether the edits since then are of this fit, or of the checkpoint that it went on from."""
    assert run.undoing is not None
    known = {place for places, _ in run.undoing for place in places}
    return known >= set(range(len(snapshot["edits"]), len(manifest.edits_of(run.pl_module))))


def _later_edits(run: Coordinator, snapshot: Snapshot) -> list[surgery.Journal]:
    """The journals of the edits since then, newest first."""
    assert run.undoing is not None
    assert can_put_back(run, snapshot)
    return [journal for places, journal in reversed(run.undoing) if places.start >= len(snapshot["edits"])]


def _check_names(run: Coordinator, snapshot: Snapshot) -> None:
    have, wanted = {name for name, *_ in _tensors(run.pl_module)}, set(snapshot["tensors"])
    problem = None
    if have != wanted:
        odd = sorted(have ^ wanted)
        problem = (
            f"the model cannot be rolled back to step {snapshot['step']}: {odd[0]!r} is in only one of the two "
            f"({len(odd)} such names), so something beside compression changed its layers; let the gate wait instead "
            "(action='pause')"
        )
    run.adapter.together(problem)


@torch.no_grad()
def _put_tensors(root: nn.Module, snapshot: Snapshot) -> None:
    fresh: dict[int, Tensor] = {}  # by what they replace, so that ties stay ties
    changed: set[int] = set()
    for name, module, _, tensor in list(_tensors(root)):
        value = snapshot["tensors"][name].to(tensor.device)
        if tensor.shape == value.shape and tensor.dtype == value.dtype:
            tensor.copy_(value)
            continue
        if id(tensor) not in fresh:
            new = value.clone()
            fresh[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        for owner, key, registry in surgery.owners_of(root, tensor):
            registry[key] = fresh[id(tensor)]
            changed.add(id(owner))
        changed.add(id(module))
    for path, module in root.named_modules(remove_duplicate=False):
        if id(module) in changed:
            for attribute, number in snapshot["widths"].get(clean_name(path), {}).items():
                setattr(module, attribute, number)


@torch.no_grad()
def _put_optimizers(run: Coordinator, kept: list[dict[str, Any]]) -> None:
    """States and parameters; learning rates and what else groups hold belong to the clock."""
    named = {clean_name(n): p for n, p in run.pl_module.named_parameters()}
    for optimizer, was in zip(run.trainer.optimizers, kept, strict=True):
        optimizer.state.clear()
        for group, names in zip(optimizer.param_groups, was["groups"], strict=True):
            group["params"][:] = [named[name] for name in names]
        for name, state in was["state"].items():
            optimizer.state[named[name]] = {k: _moved(k, v, named[name]) for k, v in state.items()}


def _moved(key: str, value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    # A count of steps stays where the optimizer put it, which a file keeps too.
    return value.clone() if key == "step" else value.to(parameter.device).clone()
