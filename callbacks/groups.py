"""Which optimizer group helper modules train in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_compress import manifest
from lightning_compress.targets import clean_name

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator


def join(run: Coordinator) -> None:
    """Train helper modules also with an optimizer that was built from the user's own parameters only.

    A parameter joins the group of the one that it mirrors, else of the layer that it sits in, else the first.
    """
    groups = [group for optimizer in run.trainer.optimizers for group in optimizer.param_groups]
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    named = {clean_name(name): parameter for name, parameter in run.pl_module.named_parameters()}
    mirrors = {ours: theirs for t in run.techniques for ours, theirs in t.mirrors(run).items()}
    for name, parameter in run.pl_module.named_parameters():
        path = name.split(".")
        ours = next((i for i, part in enumerate(path) if part.startswith(manifest.AUXILIARY)), None)
        if ours is None or id(parameter) in group_of or not groups:
            continue
        mirrored = named.get(mirrors.get(clean_name(name), ""))
        if mirrored is not None and id(mirrored) not in group_of:
            continue  # what the user does not train in the model is not trained in what is like it
        group = _group_of(mirrored, run.pl_module.get_submodule(".".join(path[:ours])), ours, groups, group_of)
        # In place, since a new group would confuse schedulers (pytorch#104361).
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)


def _group_of(
    mirrored: Tensor | None, layer: nn.Module, depth: int, groups: list[dict[str, Any]],
    group_of: dict[int, dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    if mirrored is not None:
        return group_of[id(mirrored)]
    if depth == 0:
        return groups[0]
    return next((group_of[id(p)] for p in layer.parameters() if id(p) in group_of), groups[0])
