"""How much of a signal is left: the signal-to-quantization-noise ratio of layers and of the whole model."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_compress.nested import tensor_leaves, tensors_in
from lightning_compress.probe import ExampleCall
from lightning_compress.targets import get_submodule_clean


class Ratio(NamedTuple):
    """Signal-to-quantization-noise ratios, in dB.

    Attributes:
        before: With plain rounding.
        after: After the steps.
    """

    before: float
    after: float


def signal_ratios(
    reference: nn.Module, model: nn.Module, names: Collection[str], calls: Sequence[ExampleCall]
) -> dict[str, float]:
    """10 log10 (sum of y^2 / sum of (y - yq)^2) over all calls, for outputs of layers and of the model.

    Args:
        reference: The model without quantization.
        model: The same model with it.
        names: Clean names of layers.
        calls: Calls to compare in.

    Returns:
        By name of the layer; `""` is the model. Layers that are not called in both are left out; infinite where
        nothing was lost.

    Example:
        >>> import torch
        >>> net, rough = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = net.weight.data.fill_(1.0), rough.weight.data.fill_(0.9)
        >>> {k: round(v) for k, v in signal_ratios(net, rough, [], [ExampleCall("", (torch.ones(1, 1),))]).items()}
        {'': 20}
    """
    sums: dict[str, list[float]] = {}
    for call in calls:
        wanted, given = _outputs(reference, names, call), _outputs(model, names, call)
        for name in wanted.keys() & given.keys():
            total = sums.setdefault(name, [0.0, 0.0])
            for clean, rough in zip(wanted[name], given[name], strict=False):
                total[0] += float(clean.double().square().sum())
                total[1] += float((clean.double() - rough.double()).square().sum())
    return {name: _decibel(*sums[name]) for name in ("", *names) if name in sums}


def _outputs(model: nn.Module, names: Collection[str], call: ExampleCall) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.setdefault(name, []).append(next(tensors_in(output)).detach().clone())

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(get_submodule_clean(model, name).register_forward_hook(keep(name)).remove)
        result = call.run(model)
    found[""] = [t.detach() for t in tensor_leaves(result) if t.is_floating_point()]
    return found


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
