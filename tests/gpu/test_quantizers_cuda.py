"""On CUDA quantizers compute what they compute on a CPU, and never wait for the device."""

from __future__ import annotations

import pytest
import torch
from quantizing import ACTIVATIONS, WEIGHTS, activations, ready, weights

from lightning_compress.quantization import histogram
from lightning_compress.quantization.observers import commit_all

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*(f"w:{name}" for name in WEIGHTS), *(f"a:{name}" for name in ACTIVATIONS)])
def test_values_and_gradients_are_those_of_the_cpu(name, dtype):
    kind, name = name.split(":")
    x = torch.randn(8, 4, 3, 3).to(dtype)
    quantizer = ready(weights(name), x) if kind == "w" else ready(activations(name), x, of="activations")
    grad = torch.randn(x.shape).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        quantizer.to(device)
        quantizer.zero_grad()
        own = x.clone().to(device).requires_grad_()
        y = quantizer(own)
        y.backward(grad.to(device))
        results.append([y.detach().cpu(), own.grad.cpu(), *(p.grad.cpu() for p in quantizer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse", "kl"])
@pytest.mark.parametrize("name", ["int8", "lsq4", "lsq+4", "pact4"])
def test_observing_and_computing_do_not_wait(name, observer):
    x = torch.randn(4, 50, device="cuda", requires_grad=True)
    quantizer = ready(activations(name, observer=observer), x.detach().cpu(), of="activations").cuda()
    quantizer.observing = True
    quantizer(x).sum().backward()  # what is loaded at first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantizer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    commit_all([quantizer])
    assert quantizer.hi.is_cuda


def test_counts_are_those_of_the_cpu():
    x = torch.cat([torch.randn(100_000) * 10.0**e for e in range(-8, 8)] + [torch.zeros(1 << 20)])
    assert torch.equal(histogram.count(x.cuda()).cpu(), histogram.count(x))
