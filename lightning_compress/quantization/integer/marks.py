"""From the marks of quantizers in a graph to integer weights and quantized activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.integer.codes import by_axis
from lightning_compress.quantization.integer.constants import Constants
from lightning_compress.quantization.integer.dynamic import Dynamic
from lightning_compress.quantization.integer.qdq import Grid, constant, dequantize_constant, quantize_after
from lightning_compress.quantization.integer.tracing import MARK, Traced

_aten = torch.ops.aten


def resolve_marks(traced: Traced) -> tuple[dict[fx.Node, Dynamic], dict[str, str]]:
    """Replace marks by what their quantizers compute, as integers where there are any.

    Args:
        traced: A graph with marks; edited.

    Returns:
        The marks that stay, of activations whose range is taken in each call; and why weights have no integers, by
        the name of their layer.
    """
    module = traced.module
    constants = Constants(module)
    dynamic: dict[fx.Node, Dynamic] = {}
    reasons: dict[str, str] = {}
    done: dict[Any, fx.Node] = {}
    for node in [n for n in module.graph.nodes if n.target is MARK]:
        source, name = node.args
        quantizer = traced.quantizers[name]
        if quantizer.spec.dynamic:
            low, high = quantizer.levels
            mark = _sunk(node)
            dynamic[mark] = Dynamic(low, high, quantizer.spec.symmetric, quantizer.spec.granularity)
            continue
        if (source, id(quantizer)) not in done:
            if quantizer.of == "weights" and constants.is_constant(source):
                done[source, id(quantizer)] = _weight(module, node, constants, quantizer, name, reasons)
            elif quantizer.of == "weights":
                raise CompressionError(
                    f"the weight {name!r} is computed from the model's inputs, so it cannot be stored as integers; "
                    "leave it out of the quantization"
                )
            else:
                done[source, id(quantizer)] = quantize_after(source, _grid(quantizer, name))[1]
        node.replace_all_uses_with(done[source, id(quantizer)])
        module.graph.erase_node(node)
    return dynamic, reasons


def _grid(quantizer: Any, name: str) -> Grid:
    scale, zero_point = quantizer.scale_zero_point()
    if scale.numel() != 1:
        raise CompressionError(f"the activation {name!r} has {scale.numel()} scales, and no integer kernel takes that")
    low, high = quantizer.levels
    shift = 128 if low < 0 else 0  # x86 kernels read unsigned activations
    return Grid(float(scale), int(zero_point) + shift, low + shift, high + shift)


def _weight(
    module: fx.GraphModule, node: fx.Node, constants: Constants, quantizer: Any, name: str, reasons: dict[str, str]
) -> fx.Node:
    source: Any = node.args[0]
    value: Tensor = constants.value(source)
    reason = "its scales are not one for each output channel, which is all that integer kernels know"
    found = None
    try:
        codes, scale, zero_point = quantizer.integers(value)
    except CompressionError as error:
        reason = str(error)
    else:
        if bool(zero_point.any()):
            reason = "its weights are not symmetric, and integer kernels know symmetric weights only"
        else:
            rows = quantizer.layout.rows(value)
            spread = quantizer.layout.spread(scale, rows).expand(rows.shape)
            found = by_axis(codes.to(torch.int8), quantizer.layout.back(spread, value), quantizer.layout.axis)
    stored = constants.source(source)
    with module.graph.inserting_before(node):
        if found is not None:
            return dequantize_constant(module, stored, *found)
        reasons[name.rpartition(".")[0]] = reason
        with torch.no_grad():
            return constant(module, stored, "rounded", quantizer.fake_quantize(value).float())


def _sunk(mark: fx.Node) -> fx.Node:
    """Move a mark behind a transposition that alone reads it, next to the layer; a token stays a token."""
    readers = list(mark.users)
    if len(readers) != 1 or readers[0].target is not _aten.transpose.int or "val" not in mark.meta:
        return mark
    turned, last = readers[0], mark.meta["val"].dim() - 1
    if last in [dim % (last + 1) for dim in turned.args[1:3]]:
        return mark
    turned.replace_input_with(mark, mark.args[0])  # type: ignore[arg-type]
    with mark.graph.inserting_after(turned):
        moved = mark.graph.call_function(MARK, (turned, mark.args[1]))
    moved.meta["val"] = turned.meta["val"]
    turned.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    mark.graph.erase_node(mark)
    return moved
