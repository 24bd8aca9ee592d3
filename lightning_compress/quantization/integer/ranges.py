"""Ranges of tensors inside a graph, from calibration calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.tracing import Traced, on_cpu

_MOST = 2**20  # values of a tensor that a percentile looks at


class _Watch(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, nodes: Collection[fx.Node], percentile: float) -> None:
        super().__init__(module)
        self._nodes = frozenset(nodes)
        self._percentile = percentile
        self.seen: dict[fx.Node, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._nodes:
            self.seen.setdefault(n, []).append(_range(result, self._percentile))
        return result


def _range(x: Tensor, percentile: float) -> Tensor:
    if percentile >= 100:
        return torch.stack(torch.aminmax(x))
    flat = x.flatten()
    flat = flat[:: max(1, flat.numel() // _MOST)].sort().values
    last = flat.numel() - 1
    high = round(last * percentile / 100)
    return torch.stack([flat[last - high], flat[high]])


def observe(
    traced: Traced, nodes: Collection[fx.Node], calls: Iterable[ExampleCall], percentile: float = 100.0
) -> dict[fx.Node, tuple[float, float]]:
    """The ranges of some tensors over all calls.

    Args:
        traced: The graph.
        nodes: Floating-point tensors of it.
        calls: The calibration calls.
        percentile: 100 takes minimum and maximum over all calls; less leaves out the outermost values of each call,
            and takes the mean of the calls.

    Returns:
        Node to (lowest, highest).

    Raises:
        CompressionError: There is no call, the model does not take its arguments, or a value is not finite.
    """
    watch = _Watch(traced.module, nodes, percentile)
    count = 0
    with torch.no_grad():
        for count, call in enumerate(calls, start=1):
            args, kwargs = on_cpu(call)
            try:
                watch.run(*traced.flat(args, kwargs), enable_io_processing=False)
            except Exception as error:
                raise CompressionError(
                    f"calibration call {count} fails: {type(error).__name__}: {error}. Calibration calls take the "
                    "same arguments as the example call, and shapes that differ from it in the batch size only"
                ) from error
    if count == 0:
        raise CompressionError("there is no calibration call, so no range is known; pass some batches of real inputs")
    stacked = {node: torch.stack(seen) for node, seen in watch.seen.items()}  # (calls, 2)
    for node, ends in stacked.items():
        if not bool(torch.isfinite(ends).all()):
            raise CompressionError(
                f"values that are not finite were seen at {node.name!r} in the calibration calls, so it has no range; "
                "check the inputs and the model's weights, or leave out the layer"
            )
    if percentile < 100:
        return {node: (s[:, 0].mean().item(), s[:, 1].mean().item()) for node, s in stacked.items()}
    return {node: (s[:, 0].min().item(), s[:, 1].max().item()) for node, s in stacked.items()}
