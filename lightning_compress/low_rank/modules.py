"""The layers that stand in the place of dense ones: sequences of plain layers, so that everything else works on them.

Pruning, quantization and export see `torch.nn.Linear` and `torch.nn.Conv2d` in them. Padding, stride and dilation sit
where the product stays exact, `merge` makes the dense layer again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress import layers
from lightning_compress.isolation import isolated_rng
from lightning_compress.low_rank.factorization import METHODS, Method, MethodName, Ranks, Shape

CONVOLUTIONS: tuple[type[_ConvNd], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _hear_nothing(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that only exists: torch's fused encoder layers read weights that a factored layer does not have."""


class Factored(nn.Sequential):
    """Small layers whose product is one dense layer; the last one has its bias.

    Args:
        *layers: The small layers, first one first.
    """

    method_name: ClassVar[MethodName]

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_forward_hook(_hear_nothing)

    def small(self, index: int) -> Any:
        """One of the small layers."""
        return self[index]

    @property
    def method(self) -> Method:
        """How the dense weight becomes the small ones."""
        return METHODS[self.method_name]

    @property
    def groups(self) -> int:
        """Groups of the dense layer."""
        return int(getattr(self.small(0), "groups", 1))

    @property
    def shape(self) -> Shape:
        """Shape of the dense weight."""
        raise NotImplementedError

    @property
    def weights(self) -> list[Tensor]:
        """The small weights as the layers compute with them, so with their masks and fake quantization."""
        return [layers.transformed_weight(layer) for layer in self]

    @property
    def factors(self) -> list[Tensor]:
        """The small weights in the form that `method` computes with; views of the stored parameters."""
        stored: list[Any] = [layer.weight for layer in self]
        return self.method.from_weights(stored, self.shape, self.groups)

    @property
    def ranks(self) -> Ranks:
        """The ranks."""
        factors = self.factors
        return tuple(factors[f].shape[d] for f, d in (places[0] for places in self.method.rank_dims()))

    @property
    def bias(self) -> Any:
        """The bias of the last small layer, or ``None``."""
        return self.small(-1).bias

    def dense_weight(self) -> Tensor:
        """The dense weight that the layer stands for; differentiable."""
        factors = self.method.from_weights(self.weights, self.shape, self.groups)
        return self.method.merge(factors, self.shape, self.groups)

    def merge(self) -> Any:
        """A plain dense layer that computes the same, on the same device, in the same mode."""
        weight = self.dense_weight().detach()
        with isolated_rng():
            dense = self._empty().to(device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            dense.weight.copy_(weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def _empty(self) -> Any:
        raise NotImplementedError


class LowRankLinear(Factored):
    """A linear layer as Linear(in, r) and Linear(r, out).

    Example:
        >>> import torch
        >>> from lightning_compress.low_rank.modules import build
        >>> dense = torch.nn.Linear(6, 4)
        >>> full = build(dense, "svd", (4,), dense.weight)
        >>> torch.allclose(full(torch.ones(1, 6)), dense(torch.ones(1, 6)), atol=1e-5)
        True
        >>> full.merge()
        Linear(in_features=6, out_features=4, bias=True)
    """

    method_name = "svd"

    @property
    def in_features(self) -> int:
        """As of the dense layer."""
        return int(self.small(0).in_features)

    @property
    def out_features(self) -> int:
        """As of the dense layer."""
        return int(self.small(-1).out_features)

    @property
    def shape(self) -> Shape:
        """See `Factored.shape`."""
        return self.out_features, self.in_features

    def _empty(self) -> Any:
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)


class LowRankGates(Factored):
    """A weight with gates of a recurrent layer: Linear(in, gates r), then for each gate r to its outputs."""

    method_name = "gates"

    @property
    def groups(self) -> int:
        """The gates."""
        return int(self.small(1).groups)

    @property
    def shape(self) -> Shape:
        """See `Factored.shape`."""
        return int(self.small(1).out_channels), int(self.small(0).in_features)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        inner: Tensor = self.small(0)(input)
        outer: Tensor = self.small(1)(inner.reshape(-1, inner.shape[-1], 1))
        return outer.reshape(*inner.shape[:-1], outer.shape[1])

    def _empty(self) -> Any:
        out, into = self.shape
        return nn.Linear(into, out, bias=self.bias is not None)


class LowRankEmbedding(Factored):
    """An embedding as Embedding(n, r) and Linear(r, d)."""

    method_name = "embedding"

    @property
    def shape(self) -> Shape:
        """See `Factored.shape`."""
        return int(self.small(0).num_embeddings), int(self.small(-1).out_features)

    def _empty(self) -> Any:
        first: Any = self.small(0)
        entries, width = self.shape
        return nn.Embedding(
            entries, width, padding_idx=first.padding_idx, scale_grad_by_freq=first.scale_grad_by_freq,
            sparse=first.sparse,
        )  # fmt: skip


class _FactoredConv(Factored):
    @property
    def in_channels(self) -> int:
        """As of the dense layer."""
        return int(self.small(0).in_channels)

    @property
    def out_channels(self) -> int:
        """As of the dense layer."""
        return int(self.small(-1).out_channels)

    @property
    def _spatial(self) -> dict[str, Any]:
        """Kernel, stride, padding and dilation of the dense layer."""
        return _settings(self.small(0))

    @property
    def shape(self) -> Shape:
        """See `Factored.shape`."""
        first: Any = self.small(0)
        return (self.out_channels, first.in_channels // first.groups, *self._spatial["kernel_size"])

    def _empty(self) -> Any:
        kind = layers.plain_type(self.small(0))
        return kind(
            self.in_channels, self.out_channels, groups=self.groups, bias=self.bias is not None,
            padding_mode=self.small(0).padding_mode, **self._spatial,
        )  # fmt: skip


class ChannelConv(_FactoredConv):
    """A convolution as the same kernel to r channels and a 1 x 1 convolution."""

    method_name = "channel"


class SpatialConv(_FactoredConv):
    """A 2-D convolution as an h x 1 and a 1 x w convolution."""

    method_name = "spatial"

    @property
    def _spatial(self) -> dict[str, Any]:
        return _joined(_settings(self.small(0)), _settings(self.small(1)))


class TuckerConv(_FactoredConv):
    """A convolution as a 1 x 1, a small and a 1 x 1 convolution."""

    method_name = "tucker"

    @property
    def _spatial(self) -> dict[str, Any]:
        return _settings(self.small(1))

    def _empty(self) -> Any:
        kind = layers.plain_type(self.small(1))
        return kind(
            self.in_channels, self.out_channels, groups=self.groups, bias=self.bias is not None,
            padding_mode=self.small(1).padding_mode, **self._spatial,
        )  # fmt: skip


class CpConv(_FactoredConv):
    """A 2-D convolution as 1 x 1, h x 1 and 1 x w by channel, 1 x 1."""

    method_name = "cp"

    @property
    def groups(self) -> int:
        """Always 1."""
        return 1

    @property
    def _spatial(self) -> dict[str, Any]:
        return _joined(_settings(self.small(1)), _settings(self.small(2)))


CLASSES: dict[str, type[Factored]] = {
    cls.method_name: cls
    for cls in (LowRankLinear, LowRankGates, LowRankEmbedding, ChannelConv, SpatialConv, TuckerConv, CpConv)
}


# ------------------------------------------------------------------------------------------------------------ building
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


def _settings(conv: Any) -> dict[str, Any]:
    return {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")}


def _joined(vertical: dict[str, Any], horizontal: dict[str, Any]) -> dict[str, Any]:
    """The settings of a 2-D convolution from those of its two axes."""
    return {
        name: value if isinstance(value, str) else (value[0], horizontal[name][1]) for name, value in vertical.items()
    }


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
    g, i, o, settings = conv.groups, conv.in_channels, conv.out_channels, _settings(conv)
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
