"""The layers that stand in the place of dense ones: sequences of plain layers, so that everything else works on them.

Pruning, quantization and export see `torch.nn.Linear` and `torch.nn.Conv2d` in them. Padding, stride and dilation sit
where the product stays exact, `merge` makes the dense layer again.
"""

from __future__ import annotations

from typing import Any, ClassVar

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
        >>> from lightning_compress.low_rank.building import build
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
        return settings_of(self.small(0))

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
        return _joined(settings_of(self.small(0)), settings_of(self.small(1)))


class TuckerConv(_FactoredConv):
    """A convolution as a 1 x 1, a small and a 1 x 1 convolution."""

    method_name = "tucker"

    @property
    def _spatial(self) -> dict[str, Any]:
        return settings_of(self.small(1))

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
        return _joined(settings_of(self.small(1)), settings_of(self.small(2)))


CLASSES: dict[str, type[Factored]] = {
    cls.method_name: cls
    for cls in (LowRankLinear, LowRankGates, LowRankEmbedding, ChannelConv, SpatialConv, TuckerConv, CpConv)
}


def settings_of(conv: Any) -> dict[str, Any]:
    """Kernel, stride, padding and dilation of a convolution."""
    return {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")}


def _joined(vertical: dict[str, Any], horizontal: dict[str, Any]) -> dict[str, Any]:
    """The settings of a 2-D convolution from those of its two axes."""
    return {
        name: value if isinstance(value, str) else (value[0], horizontal[name][1]) for name, value in vertical.items()
    }
