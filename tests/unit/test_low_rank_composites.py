"""Attention and recurrent layers with factors compute what the dense ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_rank_nets import factor, full_edit
from torch import Tensor, nn

from lightning_compress import recurrent
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank.attention import LowRankMultiheadAttention, split_projections
from lightning_compress.low_rank.compaction import apply_recorded
from lightning_compress.low_rank.recurrent import LowRankRecurrent
from lightning_compress.low_rank.replacement import given, replace_edit
from lightning_compress.low_rank.units import units_of


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask)


OPTIONS: list[dict[str, Any]] = [
    {}, {"bias": False}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True}, {"add_zero_attn": True, "batch_first": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_at_full_rank(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, **options)}).eval()
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 4, options.get("kdim", 8)), torch.randn(3, 4, options.get("vdim", 8))
    expected = model["attention"](q, k, v)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    expected[0].sum().backward()
    optimizer.step()
    with torch.no_grad():
        expected = model["attention"](q, k, v)
    names = {name for name, _ in model.named_parameters()}
    done = factor(model, optimizers=[optimizer])
    assert {swap.name for swap in done.swaps} == {n for n in names if "bias_k" not in n and "bias_v" not in n}
    assert done.notes == []
    assert isinstance(model["attention"], LowRankMultiheadAttention)
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()}
    for layer in (model["attention"], model["attention"].merge()):
        found = layer(q, k, v)
        assert torch.allclose(found[0], expected[0], atol=1e-5)
        assert torch.allclose(found[1], expected[1], atol=1e-5)


def test_attention_masks_and_unbatched_inputs() -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    split = LowRankMultiheadAttention(dense, split_projections(dense)).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    for arguments in ({"key_padding_mask": padding}, {"attn_mask": causal, "is_causal": True}, {"need_weights": False}):
        assert torch.allclose(split(x, x, x, **arguments)[0], dense(x, x, x, **arguments)[0], atol=1e-6)
    assert torch.allclose(split(x[0], x[0], x[0])[0], dense(x[0], x[0], x[0])[0], atol=1e-6)
    nested = torch.nested.nested_tensor([x[0], x[1, :3]])
    with pytest.raises(CompressionError, match="not nested tensors"):
        split(nested, nested, nested)


@pytest.mark.parametrize("layers", ["all", "linear only"])
def test_a_transformer_encoder_in_evaluation_takes_no_fused_path(layers: str) -> None:
    """The fused layers read weights that factored ones do not have."""
    torch.manual_seed(0)
    model = Encoder().eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected, masked = model(x), model(x, padding)
        edit, factors = full_edit(model)
        if layers != "all":
            chosen = {n: s for n, s in edit["layers"].items() if "linear" in n}
            edit, factors = dict(replace_edit(chosen)), {n: factors[n] for n in chosen}
        with given(model, factors):
            apply_recorded(model, [edit])
        assert torch.allclose(model(x), expected, atol=1e-5)
        assert torch.allclose(model(x, padding)[~padding], masked[~padding], atol=1e-5)


RECURRENT: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(3, 5, proj_size=2),
    "gru": lambda: nn.GRU(3, 5, 2), "rnn": lambda: nn.RNN(3, 5, bias=False, nonlinearity="relu"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_at_full_rank_gate_by_gate(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": RECURRENT[kind]()})
    dense = model["rnn"]
    x = torch.randn(4, 4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    dense(x)[0].sum().backward()
    optimizer.step()
    expected = dense(x)
    packed = nn.utils.rnn.pack_padded_sequence(x, [4, 2, 1, 1], batch_first=dense.batch_first)
    expected_packed = dense(packed)[0].data
    units = units_of("rnn", dense)
    assert {unit.groups for unit in units} == {recurrent.gates(dense)}
    done = factor(model, optimizers=[optimizer])
    assert done.notes == []
    layer = model["rnn"]
    assert isinstance(layer, LowRankRecurrent)
    for one in (layer, layer.merge()):
        found = one(x)
        assert torch.allclose(found[0], expected[0], atol=1e-5)
        for a, b in zip(_tuple(found[1]), _tuple(expected[1]), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        assert torch.allclose(one(packed)[0].data, expected_packed, atol=1e-5)
    assert torch.allclose(layer(x, expected[1])[0], dense(x, expected[1])[0], atol=1e-5)
    unbatched = layer(x[:, 0])[0]
    assert torch.allclose(unbatched, dense(x[:, 0])[0], atol=1e-5)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_a_shared_private_function_is_still_there() -> None:
    """The recurrent composite uses what recurrent.py keeps to itself."""
    names = ("_initial_state", "_places", "_scan", "_lstm_cell", "_gru_cell")
    assert [name for name in names if not hasattr(recurrent, name)] == []
