"""Recurrent layers written out step by step equal PyTorch's, whatever goes in; their transforms do what they say."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from lightning_compress.layers import add_transform, remove_transform
from lightning_compress.recurrent import (
    TransformedGRU,
    TransformedLSTM,
    TransformedRNN,
    gate_views,
    gates,
    input_slots,
    weight_slots,
)
from lightning_compress.transforms import TRANSFORMS

NEW = {nn.LSTM: TransformedLSTM, nn.GRU: TransformedGRU, nn.RNN: TransformedRNN}
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"proj_size": 3}),
    (nn.GRU, {}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
]
X, H, N, L = 4, 5, 3, 6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def put(module: nn.Module, **transforms: Any) -> None:
    module.__dict__[TRANSFORMS] = {slot: {"fq": transform} for slot, transform in transforms.items()}


def identity(tensor: Tensor) -> Tensor:
    return tensor.clone()


def double(tensor: Tensor) -> Tensor:
    return 2 * tensor


def swapped(module: Any, transforms: bool = True) -> Any:
    new = copy.deepcopy(module)
    new.__class__ = NEW[type(module)]
    if transforms:
        put(new, **dict.fromkeys((*weight_slots(new), *input_slots(new)), identity))
    return new


def state_for(module: Any, batch: tuple[int, ...]) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(count, *batch, module.proj_size or module.hidden_size, dtype=torch.float64, requires_grad=True)
    if not isinstance(module, nn.LSTM):
        return h
    return h, torch.randn(count, *batch, module.hidden_size, dtype=torch.float64, requires_grad=True)


def parts(output: Any, state: Any) -> list[Tensor]:
    tensors = list(output)[:1] if isinstance(output, PackedSequence) else [output]
    return tensors + (list(state) if isinstance(state, tuple) else [state])


def assert_same(module: Any, x: Any, hx: Any = None, transforms: bool = True) -> None:
    """Outputs, final states, and gradients of parameters and initial states, with the same random numbers."""
    results = []
    for one in (module, swapped(module, transforms)):
        torch.manual_seed(1)
        output, state = one(x, hx)
        found = parts(output, state)
        leaves = [*one.parameters(), *(hx if isinstance(hx, tuple) else [] if hx is None else [hx])]
        grads = torch.autograd.grad(sum((part**2).sum() for part in found), leaves)
        results.append(([*found, *grads], output))
    for expected, found in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if isinstance(x, PackedSequence):
        expected, found = results[0][1], results[1][1]
        assert torch.equal(found.batch_sizes, expected.batch_sizes)
        for name in ("sorted_indices", "unsorted_indices"):
            one, two = getattr(found, name), getattr(expected, name)
            assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_equals_pytorch_for_every_way_to_build_it(kind: Any, options: dict[str, Any], layers: int) -> None:
    for bidirectional, bias, batch_first, batched in itertools.product([True, False], repeat=4):
        module = kind(
            X,
            H,
            layers,
            bias=bias,
            batch_first=batch_first,
            bidirectional=bidirectional,
            dtype=torch.float64,
            **options,
        )
        shape = (L, X) if not batched else (N, L, X) if batch_first else (L, N, X)
        x = torch.randn(shape, dtype=torch.float64)
        assert_same(module, x, transforms=bias)
        assert_same(module, x, state_for(module, (N,) if batched else ()))


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equals_pytorch_for_packed_sequences(kind: Any, options: dict[str, Any], bidirectional: bool) -> None:
    module = kind(X, H, 2, bidirectional=bidirectional, dtype=torch.float64, **options)
    for lengths in ([6, 4, 4, 1], [1, 3, 6, 3], [5], [2, 2]):
        sequences = [torch.randn(n, X, dtype=torch.float64) for n in lengths]
        for enforce in {lengths == sorted(lengths, reverse=True), False}:
            x = pack_sequence(sequences, enforce_sorted=enforce)
            assert_same(module, x)
            assert_same(module, x, state_for(module, (len(lengths),)))


def test_a_packed_sequence_equals_its_sequences() -> None:
    module = swapped(nn.GRU(X, H, 2, bidirectional=True, batch_first=True, dtype=torch.float64))
    x, lengths = torch.randn(N, L, X, dtype=torch.float64), [3, 6, 2]
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    output, state = module(packed)
    padded, _ = pad_packed_sequence(output, batch_first=True)
    for row, length in enumerate(lengths):
        expected, last = module(x[row, :length])
        torch.testing.assert_close(padded[row, :length], expected)
        torch.testing.assert_close(state[:, row], last)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_layers_draws_the_same_random_numbers(kind: Any) -> None:
    module = kind(X, H, 3, dropout=0.4, bidirectional=True, dtype=torch.float64)
    x = torch.randn(L, N, X, dtype=torch.float64)
    assert_same(module, x)
    assert_same(module, pack_sequence([x[:, 0], x[:4, 1]]))
    assert_same(module.eval(), x)


def test_the_input_gradient_equals() -> None:
    module, found = nn.LSTM(X, H, 2, bidirectional=True, dtype=torch.float64), []
    for one in (module, swapped(module)):
        x = torch.linspace(-1, 1, L * N * X, dtype=torch.float64).view(L, N, X).requires_grad_()
        found.append(torch.autograd.grad(one(x)[0].square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0])


# ---------------------------------------------------------------------------------------------------------- transforms
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_weight_transform_is_a_changed_weight_and_runs_once(kind: Any, options: dict[str, Any]) -> None:
    module = kind(X, H, 2, bidirectional=True, dtype=torch.float64, **options)
    x, seen = torch.randn(L, N, X, dtype=torch.float64), []
    for slot in weight_slots(module):

        def transform(weight: Tensor, slot: str = slot) -> Tensor:
            seen.append(slot)
            return 2 * weight

        new, expected = swapped(module, transforms=False), copy.deepcopy(module)
        put(new, **{slot: transform})
        with torch.no_grad():
            getattr(expected, slot).mul_(2)
        torch.testing.assert_close(new(x)[0], expected(x)[0])
    assert seen == list(weight_slots(module))


def test_an_input_transform_sees_all_steps_at_once_and_a_hidden_one_each_step() -> None:
    module = swapped(nn.LSTM(X, H, 2, proj_size=3, dtype=torch.float64))
    calls: dict[str, list[tuple[int, ...]]] = {slot: [] for slot in input_slots(module)}

    def look(slot: str) -> Any:
        def transform(tensor: Tensor) -> Tensor:
            calls[slot].append(tuple(tensor.shape))
            return tensor

        return transform

    put(module, **{slot: look(slot) for slot in calls})
    module(torch.randn(L, N, X, dtype=torch.float64))
    assert calls == {
        "input_l0": [(N, L, X)],
        "hidden_l0": [(N, 3)] * L,
        "projection_l0": [(N, H)] * L,
        "input_l1": [(N, L, 3)],
        "hidden_l1": [(N, 3)] * L,
        "projection_l1": [(N, H)] * L,
    }


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_transformed_inputs_and_hidden_states_only_enter_the_products(kind: Any) -> None:
    """Doubling what enters a product is doubling its weight; the state itself stays as it is."""
    module = kind(X, H, dtype=torch.float64)
    new, expected = swapped(module, transforms=False), copy.deepcopy(module)
    put(new, input_l0=double, hidden_l0=double)
    with torch.no_grad():
        expected.weight_ih_l0.mul_(2)
        expected.weight_hh_l0.mul_(2)
    x, hx = torch.randn(L, N, X, dtype=torch.float64), state_for(module, (N,))
    for found, wanted in zip(parts(*new(x, hx)), parts(*expected(x, hx)), strict=True):
        torch.testing.assert_close(found, wanted)


# ----------------------------------------------------------------------------------------------------- life of a module
def test_a_replaced_parameter_is_used_and_survives_the_way_back() -> None:
    module = swapped(nn.LSTM(X, H, dtype=torch.float64))
    reference, x = nn.LSTM(X, H, dtype=torch.float64), torch.randn(L, N, X, dtype=torch.float64)
    for name, parameter in reference.named_parameters():
        module._parameters[name] = nn.Parameter(parameter.detach().clone())  # behind the back of `_flat_weights`
    torch.testing.assert_close(module(x)[0], reference(x)[0])
    del module.__dict__[TRANSFORMS]
    module.__class__ = nn.LSTM
    torch.testing.assert_close(module(x)[0], reference(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_transforms_are_put_on_and_taken_off(kind: Any) -> None:
    module, x = kind(X, H, 2), torch.randn(L, N, X)
    before, keys = module(x)[0], list(module.state_dict())
    child = nn.Hardtanh(-0.1, 0.1)
    for slot in ("weight_hh_l1", "hidden_l0"):
        add_transform(module, "fq", child, slot)
    assert type(module) is NEW[kind]
    assert not torch.allclose(module(x)[0], before)
    for slot in ("weight_hh_l1", "hidden_l0"):
        remove_transform(module, "fq", slot)
    assert type(module) is kind
    assert list(module.state_dict()) == keys
    assert torch.equal(module(x)[0], before)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_pickle_copy_state_dtype_and_export(kind: Any) -> None:
    plain = kind(X, H, 2, bidirectional=True)
    module, x = swapped(plain), torch.randn(L, N, X)
    assert list(module.state_dict()) == list(plain.state_dict())
    expected = module(x)[0]
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(other(x)[0], expected)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x)[0], expected)
    torch.testing.assert_close(torch.func.functional_call(module, dict(plain.named_parameters()), (x,))[0], expected)
    torch.testing.assert_close(copy.deepcopy(module).double()(x.double())[0].float(), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_bf16_and_autocast(kind: Any) -> None:
    module, x = kind(X, H, 2), torch.randn(L, N, X)
    expected = module(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(swapped(module)(x)[0].float(), expected, rtol=0.05, atol=0.02)
    half = swapped(module.bfloat16())(x.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.02)


def test_what_is_wrong_is_said() -> None:
    module = swapped(nn.LSTM(X, H))
    for x, hx, said in (
        (torch.randn(L, N, X + 1), None, "last size should be 4"),
        (torch.randn(0, N, X), None, "no 0"),
        (torch.randn(1, L, N, X), None, "3 dimensions"),
        (torch.randn(L, N, X), (torch.zeros(1, N, H), torch.zeros(1, N + 1, H)), "should have"),
    ):
        with pytest.raises(ValueError, match=said):
            module(x, hx)


def test_an_empty_batch() -> None:
    module, x = nn.GRU(X, H), torch.randn(L, 0, X)
    assert swapped(module)(x)[0].shape == module(x)[0].shape


def test_gates_are_views() -> None:
    for module, count in ((nn.LSTM(X, H), 4), (nn.GRU(X, H), 3), (nn.RNN(X, H), 1)):
        assert gates(module) == count
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            views, whole = gate_views(module, name), getattr(module, name)
            assert torch.equal(torch.cat(list(views.values())), whole)
            assert all(
                view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for view in views.values()
            )
    with pytest.raises(ValueError, match="has no gates"):
        gate_views(nn.LSTM(X, H, proj_size=2), "weight_hr_l0")


def test_the_forget_gate_is_the_second() -> None:
    module = nn.LSTM(X, H)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        gate_views(module, "bias_ih_l0")["forget"].fill_(50.0)
    c = torch.randn(1, N, H)
    _, (_, last) = module(torch.randn(L, N, X), (torch.zeros(1, N, H), c))
    torch.testing.assert_close(last, c)
