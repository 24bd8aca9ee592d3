"""Multi-head attention written out, so that its projections and inputs pass through transforms.

`torch.nn.MultiheadAttention` hands all its weights, those of its output projection included, to one function, and in
evaluation to one kernel; a transform of any of them would never be seen. `TransformedMultiheadAttention` is swapped in
place: the same parameters under the same names, every option, the same numbers.

Two things of ``torch.nn.TransformerEncoder`` go around modules in evaluation. The fused layer is off while a module of
the layer has a forward hook, as every layer with a transform does. The conversion of padded batches to nested tensors
asks for no hooks; `without_nested_tensors` switches it off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_compress.errors import CompressionError
from lightning_compress.transforms import transformed, transformed_weight

INPUT_SLOTS = ("query", "key", "value")


class TransformedOutProjection(NonDynamicallyQuantizableLinear):
    """The output projection of `torch.nn.MultiheadAttention`, computing with transforms.

    It takes part only in a `TransformedMultiheadAttention`: the plain class never calls it (see `owner_of`).
    """

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Linear`."""
        return F.linear(transformed(self, "input", input), transformed_weight(self), self.bias)


class TransformedMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` that computes with transforms (Vaswani et al., NeurIPS 2017).

    Slots: ``"in_proj_weight"``, or ``"q_proj_weight"``, ``"k_proj_weight"`` and ``"v_proj_weight"`` (with `kdim` or
    `vdim`); ``"query"``, ``"key"`` and ``"value"`` for the inputs, batch first, as (N, L, E). A tensor that comes in
    twice is transformed once, by the first slot of its roles: self-attention only uses ``"query"``. `out_proj` is
    called as a module and has slots of its own.

    Example:
        >>> import torch
        >>> attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> x = torch.randn(1, 3, 8)
        >>> with torch.no_grad():
        ...     expected = attention(x, x, x)[0]
        >>> attention.__class__ = TransformedMultiheadAttention
        >>> torch.allclose(attention(x, x, x)[0], expected, atol=1e-6)
        True
    """

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
        """See `torch.nn.MultiheadAttention`. Nested queries come back nested; their weights are padded with zeros.

        Raises:
            CompressionError: If nested tensors come with masks, in the jagged layout, or with others that are not.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return _nested_forward(self, query, key, value, key_padding_mask, need_weights, attn_mask,
                                   average_attn_weights, is_causal)  # fmt: skip
        return attend(self, lambda *inputs: _project(self, *inputs), query, key, value, key_padding_mask, need_weights,
                      attn_mask, average_attn_weights, is_causal)  # fmt: skip


def attend(
    module: Any,
    project: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `torch.nn.MultiheadAttention` computes, with projections of any kind.

    Args:
        module: Has the attributes of `torch.nn.MultiheadAttention` apart from its weights, and `out_proj`.
        project: Maps inputs (N, L, E), one object where they were one, to queries, keys and values in heads.
        query: See `torch.nn.MultiheadAttention`, like all others.
        key: As there.
        value: As there.
        key_padding_mask: As there.
        need_weights: As there.
        attn_mask: As there.
        average_attn_weights: As there.
        is_causal: As there.
    """
    batched = _is_batched(query, key, value)
    if not batched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    flip = batched and not module.batch_first
    q, k, v = project(*_distinct(query, key, value, lambda x: _batch_first(x, batched, flip)))
    attn_mask, is_causal = _attention_mask(q, k, key_padding_mask, attn_mask, is_causal, need_weights)
    k, v, attn_mask = _extended(module, k, v, attn_mask)
    dropout = module.dropout if module.training else 0.0
    weights: Tensor | None = None
    if need_weights:
        weights = _weights(q, k, attn_mask, dropout)
        mixed = weights @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
    output: Tensor = module.out_proj(mixed.transpose(1, 2).flatten(2))
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    if not batched:
        return output.squeeze(0), None if weights is None else weights.squeeze(0)
    return output.transpose(0, 1) if flip else output, weights


def _batch_first(x: Tensor, batched: bool, flip: bool) -> Tensor:
    if not batched:
        return x.unsqueeze(0)
    return x.transpose(0, 1) if flip else x


def _distinct(
    query: Tensor, key: Tensor, value: Tensor, function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a function to each of the three once; what was one tensor stays one tensor."""
    q = function(query)
    k = q if key is query else function(key)
    if value is key:
        return q, k, k
    return q, k, q if value is query else function(value)


# ---------------------------------------------------------------------------------------------------------- projections
def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of queries, keys and values: (N, L, E) -> (N, H, L, E / H)."""
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(f"keys and values go in pairs; got {tuple(key.shape)} and {tuple(value.shape)} (N, S, E)")
    self_attention = query is key and key is value
    key_is_value, value_is_query = key is value, value is query
    plain = query
    query = transformed(module, "query", query)
    key = query if key is plain else transformed(module, "key", key)
    value = key if key_is_value else query if value_is_query else transformed(module, "value", value)
    bias: Tensor | None = module.in_proj_bias
    if module._qkv_same_embed_dim:
        weight = transformed(module, "in_proj_weight", module.in_proj_weight)
        if self_attention:
            projected: tuple[Tensor, ...] = F.linear(query, weight, bias).chunk(3, dim=-1)
            return heads(module, projected[0]), heads(module, projected[1]), heads(module, projected[2])
        weights: tuple[Tensor, ...] = weight.chunk(3)
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = tuple(transformed(module, name, getattr(module, name)) for name in names)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return heads(module, q), heads(module, k), heads(module, v)


def heads(module: Any, x: Tensor) -> Tensor:
    """Rows (N, L, H * D) in heads (N, H, L, D)."""
    return x.view(*x.shape[:-1], module.num_heads, module.head_dim).transpose(1, 2)


def _extended(module: Any, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append the learned bias (`add_bias_kv`) and the zeros (`add_zero_attn`) to the keys and values (N, H, S, D)."""
    added = 0
    if module.bias_k is not None and module.bias_v is not None:
        count = k.shape[0]
        k = torch.cat([k, heads(module, module.bias_k.expand(count, 1, -1))], dim=2)
        v = torch.cat([v, heads(module, module.bias_v.expand(count, 1, -1))], dim=2)
        added += 1
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added += 1
    return k, v, mask if mask is None or not added else F.pad(mask, (0, added))


# -------------------------------------------------------------------------------------------------------- masks, scores
def _is_batched(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value have 3 dimensions, or 2 without a batch; got shapes {shapes}")
    return query.dim() == 3


def _attention_mask(
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
) -> tuple[Tensor | None, bool]:
    """One additive mask that broadcasts to (N, H, L, S), and whether `is_causal` says it all."""
    if is_causal and attn_mask is None:
        raise ValueError("is_causal is a hint about attn_mask, which is missing; pass the mask as well")
    if is_causal and key_padding_mask is None and not need_weights:
        return None, True  # as PyTorch does, even if keys are added later
    batch, heads, targets, sources = *q.shape[:3], k.shape[2]
    mask: Tensor | None = None
    if attn_mask is not None:
        expected = (targets, sources) if attn_mask.dim() == 2 else (batch * heads, targets, sources)
        if attn_mask.shape != expected:
            raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}, but should have {expected}")
        mask = _additive(attn_mask, q.dtype)
        mask = mask.expand(1, 1, targets, sources) if mask.dim() == 2 else mask.view(batch, heads, targets, sources)
    if key_padding_mask is not None:
        if key_padding_mask.shape != (batch, sources):
            found = tuple(key_padding_mask.shape)
            raise ValueError(f"key_padding_mask has shape {found}, but should have {(batch, sources)}")
        padding = _additive(key_padding_mask, q.dtype)[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask, False


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus infinity where a boolean mask is true; a float mask is added as it is."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is boolean or floating point; got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention weights (N, H, L, S), after dropout as in PyTorch."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
    return F.dropout(weights, dropout) if dropout > 0.0 else weights


# ------------------------------------------------------------------------------------------------------- nested tensors
def _nested_forward(
    module: TransformedMultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Pad, attend with a padding mask, and cut again."""
    if key_padding_mask is not None or attn_mask is not None or is_causal:
        raise CompressionError("nested tensors say themselves what is padding; pass no masks along with them")
    if not module.batch_first or not all(x.is_nested and x.layout == torch.strided for x in (query, key, value)):
        raise CompressionError(
            "attention with transforms takes nested tensors of the strided layout, all three of them, and with "
            "batch_first=True; pass padded tensors and a key_padding_mask instead"
        )
    lengths = [[len(part) for part in x.unbind()] for x in (query, key)]
    q, k, v = _distinct(query, key, value, lambda x: x.to_padded_tensor(0.0))
    positions = torch.arange(k.shape[1], device=k.device)
    padding = positions >= torch.tensor(lengths[1], device=k.device)[:, None]
    output, weights = module.forward(q, k, v, padding, need_weights, None, average_attn_weights)
    parts = [row[:length] for row, length in zip(output, lengths[0], strict=True)]
    return torch.nested.as_nested_tensor(parts), weights


def encoders_with_nested_tensors(root: nn.Module) -> list[nn.TransformerEncoder]:
    """Encoders that hand nested tensors to their layers for padded batches in evaluation (``use_nested_tensor``).

    What reduces over an input cannot do so with a nested one. With the attribute set to ``False`` outputs at padded
    positions are what the layers compute there, as in training, instead of zeros.

    Args:
        root: The model.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> len(encoders_with_nested_tensors(torch.nn.TransformerEncoder(layer, 1)))
        1
    """
    return [m for m in root.modules() if isinstance(m, nn.TransformerEncoder) and m.__dict__.get("use_nested_tensor")]


def owner_of(root: nn.Module, projection: nn.Module) -> nn.MultiheadAttention | None:
    """The attention layer whose output projection a module is; that layer has to be transformed along with it.

    Args:
        root: The model.
        projection: Any module of it.

    Example:
        >>> import torch
        >>> attention = torch.nn.MultiheadAttention(8, 2)
        >>> owner_of(attention, attention.out_proj) is attention
        True
    """
    found = (m for m in root.modules() if isinstance(m, nn.MultiheadAttention) and m.out_proj is projection)
    return next(found, None)


def weight_slots(module: nn.MultiheadAttention) -> tuple[str, ...]:
    """Names of the projection weights of queries, keys and values: one packed one, or three."""
    return ("in_proj_weight",) if module._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
