"""Multi-head attention whose projections are layers of their own, each dense or factored.

`torch.nn.MultiheadAttention` reads its weights instead of calling layers, and packs three of them into one tensor. Here
queries, keys and values have a linear layer each, so that any of them can have a rank of its own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress import attention
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.low_rank.modules import Factored

PARTS = ("q", "k", "v", "out")


class LowRankMultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with separate projections; every option, the same numbers.

    Its children are `q`, `k`, `v` and `out`, each a `torch.nn.Linear` or a `LowRankLinear`.

    Args:
        dense: Where options, biases and the parameters of projections that stay dense come from.
        projections: `q`, `k`, `v` and `out`.

    Example:
        >>> import torch
        >>> dense = torch.nn.MultiheadAttention(8, 2).eval()
        >>> split = LowRankMultiheadAttention(dense, split_projections(dense)).eval()
        >>> x = torch.randn(3, 1, 8)
        >>> torch.allclose(split(x, x, x)[0], dense(x, x, x)[0], atol=1e-6)
        True
    """

    # torch's encoder layers ask for these before they take a fused path.
    _qkv_same_embed_dim = False
    in_proj_weight: None = None
    in_proj_bias: None = None

    def __init__(self, dense: nn.MultiheadAttention, projections: dict[str, nn.Module]) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = dense.embed_dim, dense.num_heads, dense.head_dim
        self.kdim, self.vdim = dense.kdim, dense.vdim
        self.dropout, self.batch_first, self.add_zero_attn = dense.dropout, dense.batch_first, dense.add_zero_attn
        for name in PARTS:
            self.add_module(name, projections[name])
        self.register_parameter("bias_k", cast(Any, dense.bias_k))
        self.register_parameter("bias_v", cast(Any, dense.bias_v))

    @property
    def out_proj(self) -> nn.Module:
        """The output projection under the name that it has in `torch.nn.MultiheadAttention`."""
        return self._modules["out"]  # type: ignore[return-value]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention`.

        Raises:
            CompressionError: For nested tensors.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise CompressionError(
                "factored attention takes padded tensors and a key_padding_mask, not nested tensors; inside a "
                "torch.nn.TransformerEncoder pass enable_nested_tensor=False"
            )
        return attention.attend(self, self._project, query, key, value, key_padding_mask, need_weights, attn_mask,
                                average_attn_weights, is_causal)  # fmt: skip

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            attention.heads(self, self._modules[name](x))  # type: ignore[misc]
            for name, x in zip(PARTS, (query, key, value), strict=False)
        )
        return q, k, v

    def merge(self) -> nn.MultiheadAttention:
        """A plain `torch.nn.MultiheadAttention` that computes the same."""
        like = next(self.parameters())
        biased = self.out_proj.bias is not None
        with isolated_rng():
            dense = nn.MultiheadAttention(
                self.embed_dim, self.num_heads, self.dropout, biased, self.bias_k is not None, self.add_zero_attn,
                self.kdim, self.vdim, self.batch_first, device=like.device, dtype=like.dtype,
            )  # fmt: skip
        merged = {name: _dense(self._modules[name]) for name in PARTS}
        with torch.no_grad():
            for name, (target, bias) in _projections(dense).items():
                target.copy_(merged[name].weight)
                if bias is not None:
                    bias.copy_(merged[name].bias)
            for name in ("bias_k", "bias_v"):
                if getattr(self, name) is not None:
                    getattr(dense, name).copy_(getattr(self, name))
        return dense.train(self.training)


def _dense(module: Any) -> Any:
    return module.merge() if isinstance(module, Factored) else module


def _projections(dense: nn.MultiheadAttention) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Views of the weight and bias of each projection."""
    if dense._qkv_same_embed_dim:
        weights = dense.in_proj_weight.chunk(3)
    else:
        weights = (dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight)
    bias: Tensor | None = dense.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    found = {name: (w, b) for name, w, b in zip(PARTS, weights, biases, strict=False)}
    return {**found, "out": (dense.out_proj.weight, dense.out_proj.bias)}


def projection_weights(dense: nn.MultiheadAttention, whole: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of the four projections, as views.

    Args:
        dense: The attention layer.
        whole: Its parameters by name, if the layer itself holds only parts of them.

    Example:
        >>> import torch
        >>> {name: tuple(w.shape) for name, w in projection_weights(torch.nn.MultiheadAttention(8, 2)).items()}
        {'q': (8, 8), 'k': (8, 8), 'v': (8, 8), 'out': (8, 8)}
    """
    named: Any = {name: p for name, p in dense.named_parameters()} if whole is None else whole
    if dense._qkv_same_embed_dim:
        parts = named["in_proj_weight"].chunk(3)
    else:
        parts = (named["q_proj_weight"], named["k_proj_weight"], named["v_proj_weight"])
    return {**dict(zip(PARTS, parts, strict=False)), "out": named["out_proj.weight"]}


def split_projections(dense: nn.MultiheadAttention) -> dict[str, nn.Module]:
    """Plain linear layers for the four projections; the parameters of the output projection are shared."""
    made: dict[str, nn.Module] = {}
    for name, (weight, bias) in _projections(dense).items():
        with isolated_rng():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
        if name == "out":
            linear.weight, linear.bias = dense.out_proj.weight, dense.out_proj.bias
        else:
            with torch.no_grad():
                linear.weight.copy_(weight)
                if bias is not None:
                    linear.bias.copy_(bias)
            trained = next(p for n, p in dense.named_parameters() if n in ("in_proj_weight", f"{name}_proj_weight"))
            linear.weight.requires_grad_(trained.requires_grad)
            if bias is not None:
                linear.bias.requires_grad_(dense.in_proj_bias.requires_grad)
        made[name] = linear.train(dense.training)
    return made
