"""Small layers from dense ones: their shapes, their settings, and the values that a factorization gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress import layers
from lightning_compress.isolation import isolated_rng
from lightning_compress.low_rank.factorization import METHODS, Ranks, Shape
from lightning_compress.low_rank.modules import CLASSES, CONVOLUTIONS, Factored, settings_of


def build(
    module: nn.Module, method: str, ranks: Sequence[int], weight: Tensor | None = None, groups: int | None = None
) -> Factored:
    """Small layers in the place of a dense one; the dense layer is not changed, its bias is shared.

    Args:
        module: A plain `Linear`, `Conv1d`, `Conv2d`, `Conv3d` or `Embedding`.
        method: Name of the method, see `factorization`.
        ranks: Its ranks.
        weight: The dense weight to factorize; ``None`` leaves fresh values, to be loaded.
        groups: Gates of a weight of a recurrent layer; other layers say themselves how many groups they have.

    Raises:
        CompressionError: If the weight is not finite or its decomposition does not converge.
        ValueError: If the method does not fit the layer or a rank is out of range.
    """
    _check_method(module, method)
    shape = dense_shape(module)
    groups = int(getattr(module, "groups", 1)) if groups is None else groups
    check_ranks(method, ranks, shape, groups)
    like: Any = module.weight
    with isolated_rng():
        new = CLASSES[method](*_small_layers(module, method, tuple(ranks), groups, {"device": like.device}))
    new.to(dtype=like.dtype)
    if like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        new.to(memory_format=torch.channels_last)
    if getattr(module, "bias", None) is not None:
        new[-1]._parameters["bias"] = cast(Any, module.bias)  # the same parameter: whoever holds it still does
    if weight is not None:
        fill(new, METHODS[method].factorize(weight, tuple(ranks), groups))
    for layer in new:
        layer.weight.requires_grad_(like.requires_grad)
        layer.weight.__dict__.update(like.__dict__)
    return new.train(module.training)


@torch.no_grad()
def fill(layer: Factored, factors: Sequence[Tensor]) -> None:
    """Write factors into the small layers; the memory layout of each weight stays.

    Args:
        layer: The factored layer.
        factors: In the form of its method, of its ranks or smaller ones (then padded with zeros).
    """
    padded = layer.method.pad(factors, layer.ranks)
    for small, value in zip(layer, layer.method.to_weights(padded, layer.shape, layer.groups), strict=True):
        target: Any = small.weight
        target.copy_(value)


def _check_method(module: nn.Module, method: str) -> None:
    dims = len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 0
    fits = {
        "svd": isinstance(module, nn.Linear), "gates": isinstance(module, nn.Linear),
        "embedding": isinstance(module, nn.Embedding), "channel": dims > 0, "tucker": dims > 0, "spatial": dims == 2,
        "cp": dims == 2 and getattr(module, "groups", 1) == 1,
    }  # fmt: skip
    if not fits.get(method, False):
        possible = [name for name, fit in fits.items() if fit]
        raise ValueError(f"method {method!r} does not factor a {module}; possible: {possible or 'none'}")


def check_ranks(method: str, ranks: Sequence[int], shape: Shape, groups: int) -> None:
    """Refuse ranks that a weight cannot have.

    Raises:
        ValueError: With what is possible.
    """
    full = METHODS[method].full(shape, groups)
    whole = all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks)
    if len(ranks) != len(full) or not whole or not all(1 <= r <= f for r, f in zip(ranks, full, strict=True)):
        raise ValueError(
            f"a weight of shape {tuple(shape)} with {groups} group(s) has by method {method!r} {len(full)} rank(s), "
            f"from 1 to {', '.join(map(str, full))}; got {tuple(ranks)}"
        )


def dense_shape(module: nn.Module) -> Shape:
    """Shape of a dense layer's weight by its attributes: that of a shard, or of FSDP's flat parameter, may differ."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, _ConvNd):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    raise ValueError(f"a {type(module).__name__} has no one dense weight")


def _axis(settings: dict[str, Any], axis: int) -> dict[str, Any]:
    """The settings along one axis of a 2-D convolution; along the other one nothing happens."""
    neutral = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    return {
        name: value if isinstance(value, str) else tuple(v if i == axis else neutral[name] for i, v in enumerate(value))
        for name, value in settings.items()
    }


def _small_layers(module: nn.Module, method: str, ranks: Ranks, groups: int, made: dict[str, Any]) -> list[nn.Module]:
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Embedding):
        kept = {name: getattr(module, name) for name in ("padding_idx", "scale_grad_by_freq", "sparse")}
        first = nn.Embedding(module.num_embeddings, ranks[0], **kept, **made)
        return [first, nn.Linear(ranks[0], module.embedding_dim, bias=False, **made)]
    if isinstance(module, nn.Linear):
        first_linear = nn.Linear(module.in_features, ranks[0] * (groups if method == "gates" else 1), False, **made)
        if method == "gates":
            inner, out = groups * ranks[0], module.out_features
            return [first_linear, nn.Conv1d(inner, out, 1, groups=groups, bias=bias, **made)]
        return [first_linear, nn.Linear(ranks[0], module.out_features, bias=bias, **made)]
    conv: Any = module
    kind: Any = layers.plain_type(module)
    g, i, o, settings = conv.groups, conv.in_channels, conv.out_channels, settings_of(conv)
    extra = {"padding_mode": conv.padding_mode, **made}
    r = g * ranks[0]
    if method == "channel":
        return [
            kind(i, r, groups=g, bias=False, **settings, **extra),
            kind(r, o, 1, groups=g, bias=bias, **made),
        ]
    if method == "spatial":
        return [
            kind(i, r, groups=g, bias=False, **_axis(settings, 0), **extra),
            kind(r, o, groups=g, bias=bias, **_axis(settings, 1), **extra),
        ]
    if method == "cp":
        return [
            kind(i, r, 1, bias=False, **made),
            kind(r, r, groups=r, bias=False, **_axis(settings, 0), **extra),
            kind(r, r, groups=r, bias=False, **_axis(settings, 1), **extra),
            kind(r, o, 1, bias=bias, **made),
        ]
    last = g * ranks[1]
    return [
        kind(i, r, 1, groups=g, bias=False, **made),
        kind(r, last, groups=g, bias=False, **settings, **extra),
        kind(last, o, 1, groups=g, bias=bias, **made),
    ]
