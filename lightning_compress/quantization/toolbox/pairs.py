"""A layer that gives channels and the layers that take them: a factor on a channel that does not change the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.errors import CompressionError
from lightning_compress.layers import slots_of
from lightning_compress.nested import tensor_leaves
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.toolbox.channels import (
    Axis,
    Consumer,
    channel_dim,
    column_ranges,
    has_rows,
    reach,
    row_ranges,
    scale_columns_,
    scale_rows_,
)
from lightning_compress.quantization.toolbox.dataflow import Flow, Operation


@dataclass
class Pair:
    """A layer that gives channels, and the layers that take them.

    Args:
        giver: The call of the layer, or of the normalization, whose rows can be scaled.
        consumers: All readers of the channels.
        before: For batch normalization: the layer right before it, if nothing else reads that.
        clipped: Operations like ReLU6 between them.
    """

    giver: Operation
    consumers: list[Consumer]
    before: Operation | None = None
    clipped: Sequence[Operation] = ()

    @property
    def name(self) -> str:
        """Clean name of the giving layer."""
        return str(self.giver.layer)

    @property
    def takers(self) -> tuple[str, ...]:
        """Clean names of the taking layers."""
        return tuple(str(consumer.operation.layer) for consumer in self.consumers)

    def given(self) -> Tensor:
        """Range of the weights that make each channel."""
        module: Any = self.giver.module
        if not isinstance(module, _BatchNorm):
            return row_ranges(module)
        gain = module.weight.detach().abs()
        if self.before is None:
            return gain
        layer: Any = self.before.module
        return row_ranges(layer) * gain / (_tensor(module.running_var) + module.eps).sqrt()

    def taken(self) -> Tensor:
        """Range of the weights that read each channel."""
        ranges = [column_ranges(_module(c.operation), c.repeat) for c in self.consumers]
        return torch.stack(ranges).amax(0)

    def scale_(self, factor: Tensor) -> None:
        """Divide the channels by a factor and multiply what reads them.

        Args:
            factor: Positive, one number a channel.
        """
        if factor.dtype not in (torch.float32, torch.float64):
            factor = factor.float().log2().round().exp2()  # exact in half precision
        scale_rows_(self.giver.module, 1 / factor)
        for consumer in self.consumers:
            scale_columns_(_module(consumer.operation), factor, consumer.repeat)


def _module(operation: Operation) -> nn.Module:
    if operation.module is None:
        raise AssertionError("layers have a module")
    return operation.module


def _tensor(value: Tensor | None) -> Tensor:
    if value is None:
        raise AssertionError("only normalization with running statistics is followed")
    return value


def pair_of(flow: Flow, giver: Operation, attention: bool = False, clips: bool = False) -> Pair | str:
    """The pair that a layer gives channels in, or the reason why it is in none.

    Args:
        flow: The traced call.
        giver: The call of the layer, or of the normalization.
        attention: Whether `nn.MultiheadAttention` may take the channels.
        clips: Whether ReLU6 may lie between.
    """
    module: Any = giver.module
    value = giver.outputs[0]
    if giver.layer in flow.shared:
        return flow.shared[str(giver.layer)]
    if getattr(module, "weight", None) is None:
        return "it has no weight and bias of its own to scale"
    found = reach(value, Axis(channel_dim(module, len(value.shape))))
    if not found.reason and found.clipped and not clips:
        return f"{found.clipped[0].name} clips behind it, so a factor does not pass"
    for consumer in found.consumers:
        if consumer.operation.layer in flow.shared:
            return f"{consumer.operation.layer!r} reads it, and {flow.shared[str(consumer.operation.layer)]}"
        if not attention and isinstance(consumer.operation.module, nn.MultiheadAttention):
            return f"attention {consumer.operation.layer!r} reads it"
    if found.reason:
        return found.reason
    before = None
    maker = giver.args[0].maker if giver.name == "batch_norm" else None
    if maker is not None and has_rows(maker.module) and len(maker.outputs) == 1:
        before = maker if len(maker.outputs[0].readers) == 1 else None
    return Pair(giver, found.consumers, before, found.clipped)


def refuse_quantizers(model: nn.Module, what: str) -> None:
    """Raise a `CompressionError` if a layer has fake quantizers: their ranges would not follow."""
    for name, module in model.named_modules():
        if any("fq" in slot for slot in slots_of(module).values()):
            raise CompressionError(
                f"{what} changes weights and activations, but {name!r} has quantizers already, whose ranges would not "
                f"follow; call it before they are attached"
            )


def outputs_of(model: nn.Module, call: ExampleCall) -> list[Tensor]:
    """Floating-point outputs of the call."""
    return [t.detach().clone() for t in tensor_leaves(call.run(model)) if t.is_floating_point()]


def difference(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    """Largest difference relative to the largest value, over all outputs; infinite if one is not a number."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.numel():
            found = float((old.double() - new.double()).abs().max() / old.double().abs().max().clamp(min=1e-12))
            worst = max(worst, found if found == found else float("inf"))
    return worst


def checked_change(model: nn.Module, call: ExampleCall, before: Sequence[Tensor], what: str) -> float:
    """How far the outputs of the example call moved.

    Raises:
        CompressionError: If further than rounding explains.
    """
    change = difference(before, outputs_of(model, call))
    if change > _limit(before):
        raise CompressionError(
            f"{what} must not change the function of the model, but the outputs of the example call moved by "
            f"{change:.1e} of the largest one; the model is as before. Does it scale its own weights, or depend on "
            f"random numbers in evaluation mode?"
        )
    return change


def _limit(outputs: Sequence[Tensor]) -> float:
    """What rounding may do."""
    coarsest = max((torch.finfo(t.dtype).eps for t in outputs), default=1e-7)
    return float(min(max(1e-4, 16 * coarsest), 0.1))


def keeping_the_function(
    model: nn.Module, call: ExampleCall, pairs: Sequence[Pair], before: Sequence[Tensor]
) -> tuple[list[Pair], dict[str, str]]:
    """Leave out pairs of which a factor does change the outputs: code of the user can do what no tensor shows.

    Args:
        model: The model; it is left as it was.
        call: The example call.
        pairs: What was found.
        before: The outputs.

    Returns:
        The pairs that stay, and the others with the reason.
    """
    with undone(model):
        for pair in pairs:
            pair.scale_(_trial(pair))
        if difference(before, outputs_of(model, call)) <= _limit(before):
            return list(pairs), {}
    good, bad = [], {}
    for pair in pairs:
        with undone(model):
            pair.scale_(_trial(pair))
            fits = difference(before, outputs_of(model, call)) <= _limit(before)
        if fits:
            good.append(pair)
        else:
            bad[pair.name] = "a factor on its channels changed the outputs of the example call"
    return good, bad


def _trial(pair: Pair) -> Tensor:
    taken = pair.taken()
    return 2.0 ** (torch.arange(taken.numel(), device=taken.device) % 3 - 1).to(taken.dtype)


class undone:
    """Put all parameters and buffers back at the end of the block.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]

    def __enter__(self) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        """Put them back."""
        for tensor, value in self.kept:
            tensor.copy_(value)


class undone_on_error(undone):
    """Put all parameters and buffers back if the block raises."""

    def __exit__(self, *error: object) -> None:
        """Put them back if there was an error."""
        if error[0] is not None:
            super().__exit__(*error)
