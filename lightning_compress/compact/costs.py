"""What blocks cost, in exact formulas, and whether one costs less than the dense convolution that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_compress.compact.base import Geometry
from lightning_compress.compact.blocks import BLOCKS

Kind = Literal["depthwise_separable", "fire", "inverted_residual", "shuffle"]
KINDS = tuple(BLOCKS)
# Inner channels by default, as a multiple: of inputs, of outputs, of inputs, of outputs.
WIDTHS: dict[str, float] = {"depthwise_separable": 1, "fire": 0.25, "inverted_residual": 2, "shuffle": 1}
OF_INPUTS = ("depthwise_separable", "inverted_residual")


@dataclass(frozen=True)
class Shape:
    """A convolution as far as costs depend on it.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        area: Elements of the kernel.
        bias: Whether it has a bias.
    """

    inputs: int
    outputs: int
    area: int
    bias: bool = False

    @classmethod
    def of(cls, conv: Any) -> Shape:
        """That of a dense convolution."""
        return cls(conv.in_channels, conv.out_channels, Geometry.of(conv).area, conv.bias is not None)


@dataclass(frozen=True)
class Spec:
    """A block for one layer, as plain numbers.

    Args:
        to: Kind of block.
        channels: Inner channels: those that the last convolutions get.
        groups: Groups of the 1 x 1 convolutions of a shuffle unit.
        norm: Whether there is batch normalization inside.
        bias: Whether the last convolutions have a bias.
    """

    to: str
    channels: int
    groups: int = 1
    norm: bool = False
    bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            "to": self.to, "channels": self.channels, "groups": self.groups, "norm": self.norm, "bias": self.bias,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """The inverse of `to_dict`.

        Raises:
            KeyError: If an entry is missing.
            TypeError: If there are others.
        """
        return cls(**{**data, "to": data["to"], "channels": data["channels"]})


def dense_parameters(shape: Shape) -> int:
    """Parameters of the dense convolution: I O k^2, and O of the bias.

    Example:
        >>> dense_parameters(Shape(64, 128, 9))
        73728
    """
    return shape.inputs * shape.outputs * shape.area + shape.outputs * shape.bias


def dense_macs(shape: Shape, outputs: float) -> float:
    """Multiply-accumulates of the dense convolution at so many output positions."""
    return shape.inputs * shape.outputs * shape.area * outputs


def parameters(shape: Shape, spec: Spec) -> int:
    """Parameters of a block without what stands behind its last convolutions, so as it takes a layer's place.

    With I inputs, O outputs, a kernel of k^2 elements and c inner channels:

    - depthwise separable: c k^2 + c O
    - Fire: I c + c O/2 (1 + k^2), with the larger half for k^2 if O is odd
    - inverted residual: I c + c k^2 + c O, without the first if c = I
    - shuffle unit of g groups: I c / g + c k^2 + c O / g

    and biases: of the last convolutions O, if wanted; without batch normalization c of each convolution before them,
    except in the depthwise separable block, which is linear. Batch normalization has 2 c instead.

    Args:
        shape: The dense convolution.
        spec: The block.

    Example:
        >>> parameters(Shape(64, 128, 9), Spec("depthwise_separable", 64))
        8768
        >>> parameters(Shape(128, 128, 9), Spec("fire", 16)) - 16  # without the bias of the squeeze
        12288
    """
    before, last = _weights(shape, spec)
    inner = len(before) if spec.to != "depthwise_separable" else 0
    biases = spec.channels * inner
    if spec.norm:  # the squeeze of Fire keeps its bias, as in the paper's implementation
        norms = max(inner, 1)
        biases = 2 * spec.channels * norms + (spec.channels if spec.to == "fire" else 0)
    return sum(count for count, _ in before) + last + biases + shape.outputs * spec.bias


def macs(shape: Shape, spec: Spec, inputs: float, outputs: float) -> float:
    """Multiply-accumulates of a block: the weights of the formula above, each times the positions where it is used.

    The 1 x 1 convolution that comes first runs at the input's positions, everything else at the output's.

    Args:
        shape: The dense convolution.
        spec: The block.
        inputs: Positions of the input, samples included.
        outputs: Positions of the output.

    Example:
        >>> macs(Shape(64, 128, 9), Spec("depthwise_separable", 64), 256, 64)
        561152
    """
    before, last = _weights(shape, spec)
    return sum(count * (inputs if early else outputs) for count, early in before) + last * outputs


def _weights(shape: Shape, spec: Spec) -> tuple[list[tuple[int, bool]], int]:
    """Weights of each convolution before the last ones, and whether it runs at the input's positions; of the last."""
    i, o, k, c, g = shape.inputs, shape.outputs, shape.area, spec.channels, spec.groups
    if spec.to == "depthwise_separable":
        return [(c * k, False)], c * o
    if spec.to == "fire":
        return [(i * c, True)], c * (o // 2) + c * (o - o // 2) * k
    if spec.to == "inverted_residual":
        return [*([(i * c, True)] if c != i else []), (c * k, False)], c * o
    return [(i * c // g, True), (c * k, False)], c * o // g


# ------------------------------------------------------------------------------------------------------------- widths
def step_of(to: str, shape: Shape, groups: int) -> int:
    """Inner channels come in multiples of it."""
    return {"depthwise_separable": shape.inputs, "shuffle": groups}.get(to, 1)


def channels_for(to: str, shape: Shape, width: float, groups: int) -> int:
    """Inner channels for a width, a multiple of what they have to be a multiple of; at least one step.

    Args:
        to: Kind of block.
        shape: The dense convolution.
        width: Multiple of the inputs, or for Fire and the shuffle unit of the outputs.
        groups: Of the shuffle unit.

    Example:
        >>> channels_for("inverted_residual", Shape(10, 40, 9), 1.5, 1), channels_for("fire", Shape(10, 40, 9), 0.1, 1)
        (15, 4)
    """
    step = step_of(to, shape, groups)
    wanted = width * (shape.inputs if to in OF_INPUTS else shape.outputs)
    return max(1, round(wanted / step)) * step


def widest(to: str, shape: Shape, ratio: float, base: Spec) -> int | None:
    """The most inner channels with which a block has at most a share of the dense parameters; ``None`` if none has.

    Example:
        >>> widest("inverted_residual", Shape(64, 64, 9), 0.5, Spec("inverted_residual", 1))
        132
    """
    step, most = step_of(to, shape, base.groups), ratio * dense_parameters(shape)
    low, high = 0, max(1, shape.area * max(shape.inputs, shape.outputs) // step)
    while low < high:  # costs rise with width
        middle = (low + high + 1) // 2
        spec = Spec(to, middle * step, base.groups, base.norm, base.bias)
        low, high = (middle, high) if parameters(shape, spec) <= most else (low, middle - 1)
    return low * step or None


def why_not_worth(shape: Shape, spec: Spec, min_gain: float, inputs: float, outputs: float) -> str | None:
    """Why a block buys too little; ``None`` if it pays.

    Args:
        shape: The dense convolution.
        spec: The block.
        min_gain: Largest share of the dense cost that still pays, in (0, 1].
        inputs: Positions of the input; only their ratio to the output's counts.
        outputs: Positions of the output.

    Example:
        >>> why_not_worth(Shape(64, 64, 9), Spec("inverted_residual", 384), 0.9, 1, 1)
        'it would have 1.45 of its parameters'
    """
    share = parameters(shape, spec) / dense_parameters(shape)
    if share >= min_gain:
        return f"it would have {share:.2f} of its parameters"
    share = macs(shape, spec, inputs, outputs) / dense_macs(shape, outputs)
    if share >= min_gain:
        return f"it would take {share:.2f} of its multiply-accumulates"
    return None
