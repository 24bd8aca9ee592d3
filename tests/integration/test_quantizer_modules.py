"""Quantizers as modules: what they read back, averages over time, casts, state dicts, compilation, cuts."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantizing import ACTIVATIONS, WEIGHTS, activations, ready, weights
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.quantization.quantizers import make


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class _NothingIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse", "kl"])
def test_observing_reads_nothing_back(observer):
    quantizer = make(activations("lsq4", observer=observer), (1,), of="activations")
    quantizer.observing = True
    with _NothingIsRead():
        for _ in range(70):
            quantizer(torch.randn(4, 5))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_computing_reads_nothing_back(name):
    """The meta device has no values at all."""
    quantizer = ready(activations(name), torch.randn(9), of="activations").to("meta")
    x = torch.randn(3, 4, device="meta", requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.shape == (3, 4)


# -------------------------------------------------------------------------------------- copies, casts, compilation
def test_averages_over_time_have_zero_points_of_their_own_ranges():
    model = nn.Sequential(ready(activations("int8", observer="minmax"), torch.tensor([-1.0, 3.0]), of="activations"))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(model)
    model[0].commit(torch.tensor([-3.0]), torch.tensor([1.0]))
    for _ in range(200):
        average.update_parameters(model)
    assert [z.item() for z in average.module[0].scale_zero_point()] == pytest.approx([4 / 255, 191])


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_ranges_stay_float32_in_casts(cast: Callable[[nn.Module], nn.Module]):
    x = torch.randn(99)
    for name in ("int8", "lsq+4"):
        quantizer = ready(activations(name), x, of="activations")
        before = quantizer.lo.clone()
        cast(nn.Sequential(quantizer))
        assert quantizer.lo.dtype == quantizer.hi.dtype == torch.float32
        assert torch.equal(quantizer.lo, before)
        assert all(p.dtype == cast(torch.nn.Linear(1, 1)).weight.dtype for p in quantizer.parameters())
        y = quantizer(x.half())
        assert y.dtype == torch.float16
        assert quantizer.scale_zero_point()[0].dtype == torch.float32


def test_state_dict_has_ranges_and_learned_steps_only():
    assert not make(weights("int8"), (3, 4)).state_dict()
    assert {k: tuple(v.shape) for k, v in make(weights("lsq4"), (3, 4)).state_dict().items()} == {"step": (3,)}
    found = make(activations("lsq+4"), (1,), of="activations").state_dict()
    assert {k: (tuple(v.shape), v.dtype) for k, v in found.items()} == dict.fromkeys(
        ("step", "offset", "lo", "hi"), ((1,), torch.float32)
    )
    quantizer = ready(activations("int8"), torch.randn(9), of="activations")
    file = io.BytesIO()
    torch.save(quantizer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(torch.ones(3)), quantizer(torch.ones(3)))


_COMPILED = [*(f"w:{name}" for name in WEIGHTS), *(f"a:{name}" for name in ACTIVATIONS)]
_DYNAMIC = ["w:int8", "w:lsq4", "a:int8", "a:lsq+4", "a:pact4", "a:int8_dynamic"]


@pytest.mark.parametrize(("name", "dynamic"), [*((n, False) for n in _COMPILED), *((n, True) for n in _DYNAMIC)])
def test_compiles_into_one_graph(name, dynamic):
    torch._dynamo.reset()
    kind, name = name.split(":")
    x = torch.randn(6, 5)
    quantizer = (
        ready(weights(name), x) if kind == "w" else ready(activations(name), x, of="activations")
    )  # fmt: skip
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager", dynamic=dynamic)
    results = []
    for function in (quantizer, compiled):
        quantizer.zero_grad()
        own = x.clone().requires_grad_()
        y = function(own)
        y.square().sum().backward()
        results.append([y.detach(), own.grad, *(p.grad.clone() for p in quantizer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_channels_can_be_cut_from_what_is_kept_per_channel():
    w = torch.randn(6, 4)
    keep = torch.tensor([0, 2, 5])
    for spec in (weights("lsq4"), weights("int8", observer="mse"), weights("lsq4", granularity="group:2")):
        quantizer = ready(spec, w)
        small = make(spec, (3, 4))
        small.load_state_dict({name: value.index_select(0, keep) for name, value in quantizer.state_dict().items()})
        assert torch.equal(small.fake_quantize(w[keep]), quantizer.fake_quantize(w)[keep])
