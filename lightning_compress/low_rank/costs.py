"""What a weight costs dense and factored, and whether factors pay."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress.cost import count_macs
from lightning_compress.isolation import as_found, isolated_rng
from lightning_compress.low_rank.attention import LowRankMultiheadAttention
from lightning_compress.low_rank.factorization import Ranks
from lightning_compress.low_rank.modules import Factored
from lightning_compress.low_rank.recurrent import LowRankRecurrent
from lightning_compress.low_rank.units import Unit
from lightning_compress.nested import map_tensors
from lightning_compress.probe import ExampleCall
from lightning_compress.targets import clean_name


@dataclass(frozen=True)
class Geometry:
    """How often the weight of a unit is used in one example call.

    Attributes:
        inputs: Positions of its input, samples included.
        rows: Of a 2-D convolution: rows of the output times columns of the input.
        outputs: Positions of its output.
    """

    inputs: int
    rows: int
    outputs: int

    def __add__(self, other: Geometry) -> Geometry:
        return Geometry(self.inputs + other.inputs, self.rows + other.rows, self.outputs + other.outputs)


@dataclass
class Observation:
    """What an example call showed of the layers.

    Attributes:
        geometry: By layer and part.
        arguments: The arguments of the first call of each layer.
        order: Layers in the order in which they first ran.
        macs: Multiply-accumulates of the whole call.
    """

    geometry: dict[tuple[str, str], Geometry] = field(default_factory=dict)
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    macs: int = 0


def observe(root: nn.Module, call: ExampleCall, layers: Collection[str], keep_arguments: bool = False) -> Observation:
    """Run an example call and see what the layers get.

    Args:
        root: The possibly wrapped model.
        call: The call.
        layers: Clean names of the layers.
        keep_arguments: Whether to keep copies of their arguments, for timing.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3))
        >>> import torch
        >>> observe(net, ExampleCall("", (torch.zeros(2, 1, 8, 8),)), ["0"]).geometry
        {('0', 'weight'): Geometry(inputs=128, rows=96, outputs=72)}
    """
    seen = Observation()

    def listen(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name not in seen.order:
                seen.order.append(name)
                if keep_arguments:
                    copied = map_tensors(lambda t: t.detach().clone(), (args, kwargs))
                    seen.arguments[name] = (copied[0], copied[1])
            for part, geometry in geometry_of(module, args, kwargs, output).items():
                known = seen.geometry.get((name, part), Geometry(0, 0, 0))
                seen.geometry[name, part] = known + geometry

        return module.register_forward_hook(hook, with_kwargs=True)

    with ExitStack() as hooks, isolated_rng(), as_found(root):
        for name, module in list(root.named_modules()):
            clean = clean_name(name, root)
            if clean in layers:
                hooks.callback(listen(clean, module).remove)
        call.run(root)
    seen.macs = count_macs(root, call).total
    return seen


def geometry_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> dict[str, Geometry]:
    """The geometry of one call of a layer, by part."""
    if isinstance(module, (nn.MultiheadAttention, LowRankMultiheadAttention)):
        names = ("query", "key", "value")
        given = (args[i] if i < len(args) else kwargs[n] for i, n in enumerate(names))
        q, k, v = (_flat(x.numel() // x.shape[-1]) for x in given)
        return {"q": q, "k": k, "v": v, "out": q}
    first: Any = args[0] if args else next(iter(kwargs.values()))
    if isinstance(module, (nn.RNNBase, LowRankRecurrent)):
        x = first.data if isinstance(first, PackedSequence) else first
        steps = _flat(x.numel() // x.shape[-1])
        return {name: steps for name in _weight_names(module)}
    if not isinstance(first, Tensor) or not isinstance(output, Tensor):
        return {}
    if not first.is_floating_point():  # an embedding
        return {"weight": _flat(first.numel())}
    channels = getattr(module, "in_channels", None)
    if not isinstance(channels, int):
        return {"weight": _flat(first.numel() // first.shape[-1])}
    inputs = first.numel() // channels
    outputs = output.numel() // int(module.out_channels)  # type: ignore[arg-type]
    height = len(_kernel(module)) + 1
    tall = first.shape[-2] if height == 3 else 1
    rows = inputs // max(tall, 1) * output.shape[-2] if height == 3 else outputs
    return {"weight": Geometry(inputs, rows, outputs)}


def _kernel(module: nn.Module) -> tuple[int, ...]:
    return module.shape[2:] if isinstance(module, Factored) else module.kernel_size  # type: ignore[return-value]


def _weight_names(module: Any) -> list[str]:
    children = [name for name in module._modules if name.startswith("weight_")]
    return children or [name for names in module._all_weights for name in names if name.startswith("weight")]


def _flat(positions: int) -> Geometry:
    return Geometry(positions, positions, positions)


def parameters(unit: Unit, ranks: Ranks | None) -> int:
    """Elements of the weights, dense or with these ranks.

    Example:
        >>> fc = Unit("fc", "weight", "svd", (64, 64))
        >>> parameters(fc, None), parameters(fc, (8,))
        (4096, 1024)
    """
    return math.prod(unit.shape) if ranks is None else sum(unit.algebra.sizes(unit.shape, ranks, unit.groups))


def macs(unit: Unit, ranks: Ranks | None, geometry: Geometry) -> int:
    """Multiply-accumulates in the example call, dense or with these ranks; looking up embeddings is free.

    Example:
        >>> fc = Unit("fc", "weight", "svd", (64, 64))
        >>> macs(fc, (8,), Geometry(2, 2, 2))
        2048
    """
    g = geometry
    if ranks is None:
        return 0 if unit.method == "embedding" else g.outputs * math.prod(unit.shape)
    sizes = unit.algebra.sizes(unit.shape, ranks, unit.groups)
    times = {
        "spatial": (g.rows, g.outputs),
        "tucker": (g.inputs, g.outputs, g.outputs),
        "cp": (g.inputs, g.rows, g.outputs, g.outputs),
        "embedding": (0, g.outputs),
    }.get(unit.method, (g.outputs, g.outputs))
    return sum(size * count for size, count in zip(sizes, times, strict=True))


def why_not_worth(unit: Unit, ranks: Ranks, min_gain: float, geometry: Geometry | None = None) -> str | None:
    """Why factors with these ranks buy too little; ``None`` if they pay.

    Args:
        unit: The weight.
        ranks: Its ranks.
        min_gain: Largest share of the dense cost that still pays, in (0, 1].
        geometry: For multiply-accumulates; without it only parameters count.
    """
    share = parameters(unit, ranks) / parameters(unit, None)
    if share >= min_gain:
        return f"rank {_said(ranks)} would have {share:.2f} of its parameters"
    if geometry is not None and unit.method != "embedding":
        share = macs(unit, ranks, geometry) / max(macs(unit, None, geometry), 1)
        if share >= min_gain:
            return f"rank {_said(ranks)} would take {share:.2f} of its multiply-accumulates"
    return None


def _said(ranks: Ranks) -> str:
    return " x ".join(map(str, ranks))
