"""Attention written out equals `torch.nn.MultiheadAttention`, and its transforms are never gone around."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.attention import (
    TransformedMultiheadAttention,
    TransformedOutProjection,
    encoders_with_nested_tensors,
    owner_of,
    weight_slots,
)
from lightning_compress.errors import CompressionError
from lightning_compress.layers import add_transform, remove_transform
from lightning_compress.transforms import TRANSFORMS

E, H, N, L, S = 8, 2, 3, 5, 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def put(module: nn.Module, **transforms: Any) -> None:
    """Transforms by slot, without the hooks and children of `layers.add_transform`."""
    module.__dict__[TRANSFORMS] = {slot: {"fq": transform} for slot, transform in transforms.items()}


def identity(tensor: Tensor) -> Tensor:
    return tensor.clone()


def double(tensor: Tensor) -> Tensor:
    return 2 * tensor


def swapped(module: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """A copy that computes with identity transforms in every slot."""
    new = copy.deepcopy(module)
    new.__class__ = TransformedMultiheadAttention
    new.out_proj.__class__ = TransformedOutProjection
    put(new, **dict.fromkeys((*weight_slots(new), "query", "key", "value"), identity))
    put(new.out_proj, weight=identity, input=identity)
    return new


def assert_same(module: nn.MultiheadAttention, inputs: tuple[Tensor, ...], **options: Any) -> None:
    """Outputs, weights, and gradients of inputs and parameters, with the same random numbers."""
    new, results = swapped(module), []
    for one in (module, new):
        same = {id(x): x.detach().clone().requires_grad_() for x in inputs}
        torch.manual_seed(1)
        output, weights = one(*(same[id(x)] for x in inputs), **options)
        target = output.square().sum() + (0 if weights is None else (weights**3).sum())
        grads = torch.autograd.grad(target, [*same.values(), *one.parameters()], allow_unused=True)
        results.append((output, weights, *grads))
    for expected, found in zip(*results, strict=True):
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def tensors(kind: str, kdim: int, vdim: int, batch_first: bool, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    def make(length: int, width: int) -> Tensor:
        shape = (length, width) if not batched else (N, length, width) if batch_first else (length, N, width)
        return torch.randn(shape, dtype=torch.float64)

    if kind == "self":
        x = make(L, E)
        return x, x, x
    if kind == "cross":
        memory = make(S, E)
        return make(L, E), memory, memory
    if kind == "key is query":
        x = make(L, E)
        return x, x, make(L, E)
    return make(L, E), make(S, kdim), make(S, vdim)


INPUTS = [("self", E, E), ("cross", E, E), ("key is query", E, E), ("distinct", E, E), ("distinct", 6, 7)]


@pytest.mark.parametrize(("kind", "kdim", "vdim"), INPUTS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_equals_pytorch_for_every_way_to_build_it(kind: str, kdim: int, vdim: int, batch_first: bool) -> None:
    for bias, bias_kv, zero, batched in itertools.product([True, False], repeat=4):
        module = nn.MultiheadAttention(
            E, H, bias=bias, add_bias_kv=bias_kv, add_zero_attn=zero, kdim=kdim, vdim=vdim, batch_first=batch_first,
            dtype=torch.float64,
        )  # fmt: skip
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        inputs = tensors(kind, kdim, vdim, batch_first, batched)
        for need_weights, average in ((True, True), (True, False), (False, True)):
            assert_same(module, inputs, need_weights=need_weights, average_attn_weights=average)


def masks(batched: bool) -> list[dict[str, Any]]:
    rows = N if batched else 1
    upper = torch.ones(L, L).triu(1).bool()
    padding = torch.arange(L) >= torch.tensor([[L], [3], [4]])[:rows]
    whole = (torch.rand(rows * H, L, L) < 0.3) & ~torch.eye(L).bool()
    if not batched:
        padding = padding[0]
    floats = torch.randn(L, L, dtype=torch.float64)
    return [
        {"attn_mask": upper},
        {"attn_mask": floats},
        {"attn_mask": whole},
        {"attn_mask": whole * -2.0},
        {"key_padding_mask": padding},
        {"key_padding_mask": padding * -3.0},
        {"attn_mask": upper, "key_padding_mask": padding},
        {"attn_mask": whole, "key_padding_mask": padding},
        {"attn_mask": floats, "key_padding_mask": torch.zeros_like(padding, dtype=torch.float64)},
        {"attn_mask": upper, "is_causal": True},
        {"attn_mask": upper, "is_causal": True, "key_padding_mask": padding},
    ]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("case", range(11))
def test_equals_pytorch_for_every_mask(case: int, batched: bool, extra: dict[str, bool], need_weights: bool) -> None:
    module = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **extra)
    options = masks(batched)[case]
    options = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    assert_same(module, tensors("self", E, E, True, batched), need_weights=need_weights, **options)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_same_random_numbers(need_weights: bool) -> None:
    module = nn.MultiheadAttention(E, H, dropout=0.4, batch_first=True, dtype=torch.float64)
    assert_same(module, tensors("self", E, E, True), need_weights=need_weights)
    assert_same(module.eval(), tensors("self", E, E, True), need_weights=need_weights)


def test_what_is_wrong_is_said() -> None:
    module = swapped(nn.MultiheadAttention(E, H, batch_first=True))
    x = torch.randn(N, L, E)
    for options, said in (
        ({"attn_mask": torch.zeros(2, 2)}, "attn_mask has shape"),
        ({"key_padding_mask": torch.zeros(N, 2)}, "key_padding_mask has shape"),
        ({"attn_mask": torch.zeros(L, L, dtype=torch.int64)}, "boolean or floating"),
        ({"is_causal": True}, "is_causal"),
    ):
        with pytest.raises(ValueError, match=said):
            module(x, x, x, **options)
    with pytest.raises(ValueError, match="3 dimensions"):
        module(x, x[0], x[0])
    with pytest.raises(ValueError, match="go in pairs"):
        module(x, x[:, :2], x[:, :3])


def counted(calls: list[str], name: str) -> Any:
    def transform(tensor: Tensor) -> Tensor:
        calls.append(name)
        return tensor

    return transform


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("self", ["query"]),
        ("cross", ["query", "key"]),
        ("key is query", ["query", "value"]),
        ("distinct", ["query", "key", "value"]),
    ],
)
def test_an_input_is_transformed_once(kind: str, expected: list[str]) -> None:
    module = swapped(nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64))
    calls: list[str] = []
    put(module, **{name: counted(calls, name) for name in ("query", "key", "value")})
    module(*tensors(kind, E, E, True))
    assert calls == expected


@pytest.mark.parametrize("kdim", [E, 6])
def test_transforms_do_what_they_say(kdim: int) -> None:
    module = nn.MultiheadAttention(E, H, kdim=kdim, batch_first=True, dtype=torch.float64)
    new, expected = swapped(module), copy.deepcopy(module)
    put(new, **dict.fromkeys(weight_slots(new), double), query=double)
    put(new.out_proj, weight=double, input=double)
    with torch.no_grad():
        for name in weight_slots(module):
            getattr(expected, name).mul_(2)
        expected.out_proj.weight.mul_(4)
    query, key, value = tensors("distinct", kdim, E, True)
    torch.testing.assert_close(new(query, key, value), expected(2 * query, key, value))


@pytest.mark.parametrize("batch_first", [True, False])
def test_inputs_are_transformed_batch_first(batch_first: bool) -> None:
    module = swapped(nn.MultiheadAttention(E, H, batch_first=batch_first, dtype=torch.float64))
    shapes: list[torch.Size] = []

    def look(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    put(module, query=look)
    put(module.out_proj, input=look)
    module(*tensors("self", E, E, batch_first))
    assert shapes == [(N, L, E), (N, L, E)]


# ------------------------------------------------------------------------------------------------- PyTorch's own layers
def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, dtype=torch.float64, **options)
    return nn.TransformerEncoder(layer, layers).eval()


def swap_attention(root: nn.Module, transform: Any = identity) -> None:
    for module in list(root.modules()):
        if type(module) is nn.MultiheadAttention:
            module.__class__ = TransformedMultiheadAttention
            module.out_proj.__class__ = TransformedOutProjection
            put(module, in_proj_weight=transform)
            put(module.out_proj, weight=transform)
            module.register_forward_hook(lambda *_: None)  # what `layers.add_transform` does


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_an_encoder_in_evaluation_computes_with_the_transforms(padded: bool, nested: bool) -> None:
    model = encoder()
    x = torch.randn(N, L, E, dtype=torch.float64)
    mask = torch.arange(L) >= torch.tensor([[L], [3], [4]]) if padded else None
    kept = torch.ones(N, L, dtype=torch.bool) if mask is None else ~mask
    plain, doubled = model(x, src_key_padding_mask=mask), copy.deepcopy(model)
    for name, parameter in doubled.named_parameters():
        if "proj_weight" in name or "out_proj.weight" in name:
            parameter.mul_(2)
    expected = doubled(x, src_key_padding_mask=mask)
    assert not torch.allclose(plain[kept], expected[kept])
    for transform, wanted in ((identity, plain), (double, expected)):
        new = copy.deepcopy(model)
        swap_attention(new, transform)
        if not nested:
            for found in encoders_with_nested_tensors(new):
                found.use_nested_tensor = False
        with_nested = new(x, src_key_padding_mask=mask)
        torch.testing.assert_close(with_nested[kept], wanted[kept], rtol=1e-6, atol=1e-6)
        if nested:
            torch.testing.assert_close(with_nested, wanted, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_transforms_are_put_on_and_taken_off() -> None:
    model, x = encoder(1), torch.randn(N, L, E, dtype=torch.float64)
    before, attention = model(x), model.layers[0].self_attn
    keys = list(model.state_dict())
    add_transform(attention, "mask", double, slot="in_proj_weight")
    add_transform(attention.out_proj, "mask", double)
    assert type(attention) is TransformedMultiheadAttention
    found = model(x)
    remove_transform(attention, "mask", slot="in_proj_weight")
    remove_transform(attention.out_proj, "mask")
    assert type(attention) is nn.MultiheadAttention
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)
    attention.in_proj_weight.mul_(2)
    attention.out_proj.weight.mul_(2)
    torch.testing.assert_close(found, model(x))


@torch.no_grad()
def test_an_encoder_without_nested_tensors_is_what_it_is_in_training() -> None:
    model = encoder()
    swap_attention(model)
    mask = torch.arange(L) >= torch.tensor([[L], [3], [4]])
    x = torch.randn(N, L, E, dtype=torch.float64)
    nested = model(x, src_key_padding_mask=mask)
    (found,) = encoders_with_nested_tensors(model)
    found.use_nested_tensor = False
    padded = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(padded, model.train()(x, src_key_padding_mask=mask))
    found.use_nested_tensor = True
    assert torch.equal(model.eval()(x, src_key_padding_mask=mask), nested)


def test_a_decoder_layer_equals_pytorch() -> None:
    layer = nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, dtype=torch.float64)
    target, memory = torch.randn(L, N, E, dtype=torch.float64), torch.randn(S, N, E, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    expected = layer(target, memory, tgt_mask=causal, tgt_is_causal=True)
    swap_attention(layer)
    torch.testing.assert_close(layer(target, memory, tgt_mask=causal, tgt_is_causal=True), expected)


def test_nested_tensors_that_cannot_work_are_refused() -> None:
    module = swapped(nn.MultiheadAttention(E, H, batch_first=True)).eval()
    rows = [torch.randn(2, E), torch.randn(3, E)]
    nested = torch.nested.nested_tensor(rows)
    with pytest.raises(CompressionError, match="no masks"):
        module(nested, nested, nested, key_padding_mask=torch.zeros(2, 3))
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(CompressionError, match="strided layout"):
        module(jagged, jagged, jagged)
    dense = torch.randn(2, 3, E)
    with pytest.raises(CompressionError, match="all three"):
        module(nested, dense, dense)


def test_pickle_copy_state_and_export() -> None:
    module = swapped(nn.MultiheadAttention(E, H, batch_first=True)).eval()
    assert list(module.state_dict()) == list(nn.MultiheadAttention(E, H).state_dict())
    x = torch.randn(N, L, E)
    expected = module(x, x, x)[0]
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(other(x, x, x)[0], expected)
    exported = torch.export.export(module, (x, x, x)).module()
    torch.testing.assert_close(exported(x, x, x)[0], expected)


def test_autocast_and_bf16() -> None:
    module = nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = module(x, x, x)[0], swapped(module)(x, x, x)[0]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    mask = torch.ones(L, L).triu(1).bool()
    half = module.bfloat16()
    y = x.bfloat16()
    torch.testing.assert_close(
        swapped(half)(y, y, y, attn_mask=mask), half(y, y, y, attn_mask=mask), rtol=2e-2, atol=2e-2
    )


def test_the_owner_of_an_output_projection() -> None:
    layer = nn.TransformerDecoderLayer(E, H, 16)
    assert owner_of(layer, layer.multihead_attn.out_proj) is layer.multihead_attn
    assert owner_of(layer, layer.linear1) is None
