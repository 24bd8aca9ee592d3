"""Weights narrowed to what CPUs without VNNI instructions add correctly.

On such x86 CPUs the kernels of oneDNN (inductor, OpenVINO) and ONNX Runtime multiply an activation of 0 to 255 with a
weight of -127 to 127 and add two such products in 16 bits, which silently stops at 32,767. Two weights of one output
whose absolute values add up to 128 at most are safe, as 255 * 128 = 32,640. Outputs with larger pairs get a larger
scale, and so weights of 7 to 8 bits; the others stay exactly as they are.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx

from lightning_compress.quantization.integer.folding import LAYERS
from lightning_compress.quantization.integer.qdq import DEQUANTIZE_CHANNELS

_SAFE = 128  # of two absolute codes; 255 * 128 < 2**15


def without_saturation(program: torch.export.ExportedProgram) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """A program whose 8-bit products never overflow 16 bits in pairs.

    Args:
        program: A graph of integers; left as it is.

    Returns:
        The program, or a copy if weights had to change; and the names of the weights that did.

    Example:
        >>> from lightning_compress.probe import ExampleCall
        >>> from lightning_compress.quantization.integer.lowering import lower
        >>> net = torch.nn.Linear(4, 2)
        >>> call = ExampleCall("", (torch.randn(8, 4),))
        >>> safe, names = without_saturation(lower(net, call, [call]).program)
        >>> without_saturation(safe)[1]
        ()
    """
    weights = _weights(program)
    wide = {names: axis for names, axis in weights.items() if _most(program.state_dict[names[0]], axis) > _SAFE}
    if not wide:
        return program, ()
    program = copy.deepcopy(program)
    with torch.no_grad():
        for (codes, scale), axis in wide.items():
            _narrow(program.state_dict[codes], program.state_dict[scale], axis)
    return program, tuple(codes for codes, _ in wide)


def _weights(program: torch.export.ExportedProgram) -> dict[tuple[str, str], int]:
    """Names of the codes and the scales of layers' weights, and the dimension that has a scale for each index."""
    signature = program.graph_signature
    buffers = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    found: dict[tuple[str, str], int] = {}
    for node in program.graph.nodes:
        codes, scale, axis = _parts(node)
        if codes in buffers and scale in buffers:
            found[buffers[codes], buffers[scale]] = axis
    return found


def _parts(node: fx.Node) -> tuple[str, str, int]:
    """Codes, scales and their dimension, if a node reads a weight."""
    if node.target is DEQUANTIZE_CHANNELS and any(user.target in LAYERS for user in node.users):
        codes, scale, axis = node.args[0], node.args[1], node.args[3]
        assert isinstance(axis, int)
        return str(codes), str(scale), axis
    return "", "", 0


def _pairs(codes: Tensor, axis: int) -> Tensor:
    """The largest sum of two absolute codes of each output channel."""
    rows = codes.movedim(axis, 0).flatten(1).abs().to(torch.int32) if codes.dim() > 1 else codes.abs().int()[:, None]
    return rows.topk(min(2, rows.shape[1]), dim=1).values.sum(1)


def _most(codes: Tensor, axis: int) -> int:
    return int(_pairs(codes, axis).max()) if codes.numel() else 0


def _narrow(codes: Tensor, scale: Tensor, axis: int) -> None:
    factor = (_pairs(codes, axis) / _SAFE).clamp(min=1.0)
    shape = [-1 if d == axis else 1 for d in range(codes.dim())]
    rounded = codes / factor.reshape(shape)
    # Towards zero where rounding would bring a pair over the limit again: both of it were rounded up.
    narrowed = rounded.round()
    over = _pairs(narrowed.to(torch.int8), axis) > _SAFE
    narrowed = torch.where(over.reshape(shape) & (factor.reshape(shape) > 1), rounded.trunc(), narrowed)
    codes.copy_(narrowed.to(torch.int8))
    scale.mul_(torch.where(factor > 1, factor, 1.0))
