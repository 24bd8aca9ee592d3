"""How much of an answer flows through each channel: explanations as a measure of importance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.audits.attributions import captum
from lightning_compress.audits.handles import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.nested import map_tensors
from lightning_compress.probe import ExampleCall
from lightning_compress.targets import get_submodule_clean


def channel_conductance(
    root: nn.Module, layers: Sequence[str], calls: Sequence[ExampleCall], *, steps: int = 16
) -> dict[str, Tensor]:
    """Mean absolute conductance of the output channels of layers, for what the model answers.

    Conductance is the part of integrated gradients, from an input of zeros to the example, that flows through a unit.
    It is summed over the places of a channel, and the absolute values are averaged over examples. Run it inside of
    `audit_context`.

    Args:
        root: The model.
        layers: Clean names; those that a call does not run are left out.
        calls: Batches, as arguments of a module: the first one is interpolated and has to be float. What the module
            returns are logits: (N, C) or (N, C, ...).
        steps: Of the path.

    Returns:
        Layer -> (channels,) in float64, at least 0.

    Raises:
        CompressionError: Captum is missing, the first argument is no float tensor, or there is no gradient.

    Reference: Dhamdhere, Sundararajan, Yan 2019, arXiv 1805.12233.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[1].weight[:, 0].zero_()
        >>> found = channel_conductance(net, ["0"], [ExampleCall("", (torch.rand(8, 2),))])
        >>> float(found["0"][0]), bool((found["0"][1:] > 0).all())
        (0.0, True)
    """
    totals: dict[str, Tensor] = {}
    examples = 0
    for call in calls:
        module = get_submodule_clean(root, call.module) if call.module else root
        forward, x, extra = _as_function(module, call)
        examples += len(x)
        for name in _that_run(root, layers, lambda forward=forward, x=x, extra=extra: forward(x, *extra)):
            found = captum().LayerConductance(forward, get_submodule_clean(root, name)).attribute(
                x, baselines=torch.zeros_like(x), additional_forward_args=extra, n_steps=steps
            )  # fmt: skip
            found = found[0] if isinstance(found, tuple) else found
            totals[name] = totals.get(name, 0.0) + _by_channel(get_submodule_clean(root, name), found.detach().double())
    return {name: total.cpu() / max(examples, 1) for name, total in totals.items()}


def _by_channel(layer: nn.Module, conductance: Tensor) -> Tensor:
    """Sum over places, absolute value, sum over examples: (N, C, ...), or (N, ..., C) of linear layers."""
    last = isinstance(layer, nn.Linear)
    rows = conductance.movedim(-1, 1) if last else conductance
    return rows.reshape(rows.shape[0], rows.shape[1], -1).sum(2).abs().sum(0)


def _as_function(module: nn.Module, call: ExampleCall) -> tuple[Any, Tensor, tuple[Tensor, ...]]:
    """A function of the first argument that gives one number an example, and the tensors that come along."""
    arguments = (tuple(call.args), dict(call.kwargs))
    first = call.args[0] if call.args else None
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise CompressionError(
            "conductance follows a path from an input of zeros, so the first argument of the model has to be a float "
            f"tensor; got {type(first).__name__}{'' if not isinstance(first, Tensor) else f' of {first.dtype}'}. Rank "
            "channels by criterion='magnitude'"
        )
    x = first.detach().clone().requires_grad_()
    moving: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor is not first and tensor.dim() and len(tensor) == len(x):
            moving.append(tensor)
        return tensor

    map_tensors(note, arguments)

    def run(given: Tensor, *others: Tensor) -> Tensor:
        rest = iter(others)
        args, kwargs = map_tensors(
            lambda t: given if t is first else next(rest) if any(t is m for m in moving) else t, arguments
        )
        return logits_of(module(*args, **kwargs))

    with torch.no_grad():
        logits = run(x, *moving)
        choice = logits.flatten(1).argmax(1) if logits.dim() < 3 else logits.argmax(1)

    def forward(given: Tensor, chosen: Tensor, *others: Tensor) -> Tensor:
        z = run(given, *others)
        if z.dim() < 3:
            return z.flatten(1).gather(1, chosen[:, None])[:, 0]
        return z.gather(1, chosen.unsqueeze(1)).flatten(1).mean(1)

    return forward, x, (choice, *moving)


def _that_run(root: nn.Module, layers: Sequence[str], call: Any) -> list[str]:
    """Layers that are called and return one tensor."""
    ran: set[str] = set()
    hooks = []
    for name in layers:

        def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                ran.add(name)

        hooks.append(get_submodule_clean(root, name).register_forward_hook(hook))
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in hooks:
            handle.remove()
    return [name for name in layers if name in ran]
