"""Which tensors get quantized between the layers, and that all readers share one pair."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from quantized_nets import NETS, image_calls, quantized
from torch import Tensor, fx, nn

from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.lowering import Lowered, lower
from lightning_compress.quantization.integer.qdq import (
    DEQUANTIZE,
    DEQUANTIZE_CHANNELS,
    QUANTIZE,
    Grid,
    is_dequantize,
    is_quantize,
    quantize_after,
)

aten = torch.ops.aten


def nodes(lowered: Lowered, target: object) -> list[fx.Node]:
    return [node for node in lowered.program.graph.nodes if node.target is target]


def reads_integers(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS)


def gives_integers(node: fx.Node) -> bool:
    """Whether it, or the activation that alone reads it, is read by one quantize node only."""
    readers = list(node.users)
    if len(readers) == 1 and readers[0].target in (aten.relu.default, aten.hardtanh.default):
        readers = list(readers[0].users)
    return len(readers) == 1 and is_quantize(readers[0])


@pytest.mark.parametrize("trained", [True, False])
def test_convolutions_and_their_sums_are_integer_all_around(trained: bool) -> None:
    torch.manual_seed(0)
    make, calls = NETS["residual"]
    model, batches = make().eval(), calls()
    if trained:
        quantized(model, batches, "int8", "int8")
    lowered = lower(model, batches[0], batches)
    convolutions, sums = nodes(lowered, aten.conv2d.default), nodes(lowered, aten.add.Tensor)
    assert len(convolutions) == 2
    assert all(reads_integers(a) for node in convolutions for a in node.args[:2])
    assert all(gives_integers(node) for node in [*convolutions, *sums])
    assert [reads_integers(a) for node in sums for a in node.args] == [True, True]
    (head,) = nodes(lowered, aten.linear.default)
    assert all(reads_integers(a) for a in head.args[:2])
    assert [user.op for user in head.users] == ["output"], "logits stay as precise as they are"


def test_one_pair_for_each_tensor() -> None:
    torch.manual_seed(0)
    batches = image_calls()
    lowered = lower(NETS["residual"][0]().eval(), batches[0], batches)
    sources = Counter(node.args[0] for node in nodes(lowered, QUANTIZE))
    assert set(sources.values()) == {1}
    assert all(len(node.users) == 1 for node in nodes(lowered, QUANTIZE))


def test_the_residual_stream_behind_linear_layers_stays() -> None:
    """But the layer's output is quantized, which keeps inductor from adding into the other operand."""
    torch.manual_seed(0)
    make, calls = NETS["encoder"]
    batches = calls()
    lowered = lower(make().eval(), batches[0], batches)
    linears = nodes(lowered, aten.linear.default)
    assert all(gives_integers(node) for node in linears[:-1])
    assert all(node.args[0].meta["val"].dim() == 2 for node in linears)
    for node in nodes(lowered, aten.add.Tensor):
        assert not any(is_quantize(user) for user in node.users)


class WithConstant(nn.Module):
    """A constant image is added to the output of a convolution, and a plain bias to another's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.image, self.bias = nn.Parameter(torch.randn(1, 4, 8, 8)), nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(self.a(x) + self.image) + self.bias)


def test_constant_operands_are_stored_as_integers_and_biases_are_not() -> None:
    torch.manual_seed(0)
    batches = image_calls()
    lowered = lower(WithConstant().eval(), batches[0], batches)
    stored = {name: value.dtype for name, value in lowered.program.state_dict.items() if "zero_point" not in name}
    assert stored["image_uint8"] == torch.uint8
    assert stored["bias"] == torch.float32
    assert "image" not in stored


def test_masks_of_attention_are_left_alone() -> None:
    """Sums in which no layer takes part may hold minus infinity."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) + self.mask, -1)

    torch.manual_seed(0)
    model, call = Masked().eval(), ExampleCall("", (torch.randn(2, 5, 4),))
    lowered = lower(model, call, [call])
    with torch.no_grad():
        torch.testing.assert_close(lowered.module()(*call.args), model(*call.args), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("low", "high", "zero"), [(0, 15, 0), (0, 3, 0), (0, 1, 0), (0, 7, 2), (120, 135, 128), (126, 129, 128),
                              (0, 31, 9), (0, 63, 0), (0, 127, 3), (1, 255, 128)]
)  # fmt: skip
def test_fewer_codes_pass_through_256_without_a_change(low: int, high: int, zero: int) -> None:
    """A value is rounded twice, first to a finer grid; the result is that of rounding once."""
    scale = 0.0371
    graph = fx.Graph()
    x = graph.placeholder("x")
    _, result = quantize_after(x, Grid(scale, zero, low, high))
    graph.output(result)
    module = fx.GraphModule(nn.Module(), graph)
    values = torch.linspace(-40 * scale, 300 * scale, 200_001)
    values = values[(values / scale - (values / scale).floor() - 0.5).abs() > 1e-3]  # not where rounding errors decide
    expected = (torch.round(values / scale) + zero).clamp(low, high).sub(zero) * scale
    torch.testing.assert_close(module(values), expected)


def test_other_readers_do_not_get_the_few_bits_of_a_trained_input() -> None:
    torch.manual_seed(0)
    make, calls = NETS["residual"]
    model, batches = make(), calls()
    quantized(model, batches, "int8", "int2")
    lowered = lower(model, batches[0], batches)
    (total,) = nodes(lowered, aten.add.Tensor)
    pair = next(a for a in total.args if isinstance(a, fx.Node) and is_dequantize(a))
    assert pair.args[0].target is QUANTIZE
    with torch.no_grad():
        out = torch.fx.Interpreter(lowered.module()).run(*batches[0].args)
    assert bool(torch.isfinite(out).all())
