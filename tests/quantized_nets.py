"""Small networks with quantizers, calibrated and switched on, for tests of what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_compress import layers
from lightning_compress.callbacks.testing import TinyNet
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization import attachment
from lightning_compress.quantization.observers import commit_all
from lightning_compress.quantization.spec import QuantSpec, parse


class Residual(nn.Module):
    """Conv, BatchNorm, a residual sum and a linear head; some factors of the BatchNorm are negative."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        for norm in (self.norm, self.norm2):
            with torch.no_grad():
                norm.weight.copy_(torch.linspace(-1.2, 1.5, 8))
                norm.bias.normal_()
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.conv(x)))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """Attention and an MLP on a residual stream, then a head for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


class SequenceNet(TinyNet):
    """Classes of images that are read as sequences: row by row, or as 16 brightness levels with an embedding."""

    def __init__(self, kind: str = "LSTM", lr: float = 1e-2, optimizer: str = "sgd") -> None:
        super().__init__(8, lr, optimizer)
        self.save_hyperparameters()
        self.kind, self.head = kind, nn.Linear(16, 4)
        if kind == "attention":
            encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.net = nn.Sequential(nn.Embedding(11, 16), encoder)
        else:
            self.net = getattr(nn, kind)(8, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attention":
            y = self.net((x[:, 0, ::2, ::2].flatten(1) * 2 + 5).long().clamp(0, 10))
        else:
            y = self.net(x.squeeze(1))[0]
        return self.head(y.mean(1))


def image_calls(count: int = 3, batch: int = 4) -> list[ExampleCall]:
    return [ExampleCall("", (torch.randn(batch, 3, 8, 8),)) for _ in range(count)]


def token_calls(count: int = 3, batch: int = 4) -> list[ExampleCall]:
    return [ExampleCall("", (torch.randint(0, 11, (batch, 6)),)) for _ in range(count)]


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., list[ExampleCall]]]] = {
    "residual": (Residual, image_calls),
    "encoder": (Encoder, token_calls),
}


def quantized(
    model: nn.Module, calls: Sequence[ExampleCall], weights: str | QuantSpec, activations: str | QuantSpec | None
) -> nn.Module:
    """Attach quantizers to every layer, let them see the calls, and enable them."""
    of_weights, of_activations = parse(weights, of="weights"), parse(activations, of="activations")
    plan: dict[str, dict[str, QuantSpec]] = {}
    for name, module in model.named_modules():
        slots = attachment.slots_for(module)
        chosen = {slot: of_weights for slot in slots.weights} | {slot: of_activations for slot in slots.activations}
        plan[name] = {slot: spec for slot, spec in chosen.items() if spec is not None}
    attachment.attach(model.eval(), {name: slots for name, slots in plan.items() if slots})
    found = list({id(quantizer): quantizer for quantizer in attachment.quantizers(model).values()}.values())
    for quantizer in found:
        quantizer.observing = quantizer.training = True
    with torch.no_grad():
        for call in calls:
            model(*call.args)
    commit_all(found, None)
    for module in model.modules():
        for slot, transforms in layers.slots_of(module).items():
            quantizer = transforms["fq"]
            if quantizer.of == "weights" or quantizer.has_range:
                quantizer.initialize(getattr(module, slot) if quantizer.of == "weights" else None)
    for quantizer in found:
        quantizer.observing = quantizer.training = False
    return attachment.enable(model)
