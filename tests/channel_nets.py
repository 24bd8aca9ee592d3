"""Small networks of every coupling, and what the tests of channel pruning do with them."""

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import surgery
from lightning_compress.probe import ExampleCall
from lightning_compress.pruning.budgets import Budget
from lightning_compress.pruning.channels import dense_reference, plan_cut

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import zoo

torch.set_num_threads(1)
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def plan(model, x, **options):
    call = ExampleCall("", (x,))
    options = {"target": Budget(keep_macs=0.5), "dense": options.pop("dense", None), **options}
    options["dense"] = options["dense"] or dense_reference(model, call)
    return plan_cut(model, call, **options)


def apply(model, cut):
    with surgery.edit(model, [cut.edit]):
        return model


def cut_copy(model, cut):
    return apply(copy.deepcopy(model), cut)


def macs(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


def awake(model):
    """Give norms and biases values that show when a wrong channel is used."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        for name in ("weight", "bias", "running_mean"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 1:
                tensor.data.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


@torch.no_grad()
def silence(model, cut):
    """The masked network: everything that produces or scales a removed channel is exactly zero."""
    model = copy.deepcopy(model)
    named = surgery.tensors_by_name(model)
    for name, dims in cut.edit["slices"].items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if "running" in name:
            continue
        out = "1" if isinstance(owner, nn.ConvTranspose2d) and named[name].dim() > 1 else "0"
        if out in dims:
            gone = torch.ones(named[name].shape[int(out)], dtype=torch.bool)
            gone[dims[out]] = False
            named[name].index_fill_(int(out), gone.nonzero().ravel(), 0)
    return model


# ------------------------------------------------------------------------------------------------------- small nets
class ResidualNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.bn1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.b, self.bn2 = nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(x + self.bn2(self.b(torch.relu(self.bn1(self.a(x))))))
        return self.head(x.mean((2, 3)))


class DenseNet(nn.Module):
    """Each layer reads the concatenation of all before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 8 * i) for i in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(8 + 8 * i, 8, 3, padding=1, bias=False) for i in range(3))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(layer(torch.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1).mean((2, 3)))


def sequence(*layers):
    return nn.Sequential(*layers)


def grouped_net():
    return sequence(
        nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=8), nn.ReLU(),
        nn.Conv2d(32, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def separable_net():
    return sequence(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def flatten_net():
    return sequence(
        nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 32), nn.ReLU(), nn.Linear(32, 5)
    )


def transposed_net():
    return sequence(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 24, 2, 2), nn.BatchNorm2d(24), nn.ReLU(),
        nn.ConvTranspose2d(24, 24, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(24, 2, 1),
    )  # fmt: skip


NETS = {
    "residual": ResidualNet,
    "dense": DenseNet,
    "grouped": grouped_net,
    "separable": separable_net,
    "flatten": flatten_net,
    "transposed": transposed_net,
    "unet": lambda: zoo.UNet(8),
}
