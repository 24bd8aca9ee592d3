"""For tests, of this package and of its users: tiny models, loaders that resume, and runs of two processes.

A launch starts one process per rank and runs a list of cases in them, since starting is what takes long. A case is a
module-level function without arguments that returns plain data; the launch returns what each rank returned.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset


# ------------------------------------------------------------------------------------------------------------- models
class TinyNet(L.LightningModule):
    """A small convolutional classifier on 8 x 8 images with 4 classes.

    Args:
        width: Channels.
        lr: Learning rate.
        optimizer: ``"sgd"`` (momentum 0.9) or the name of a class in `torch.optim`.
        dropout: Dropout rate before the head.
        batchnorm: Whether there is batch normalisation.
    """

    def __init__(
        self, width: int = 16, lr: float = 1e-2, optimizer: str = "sgd", dropout: float = 0.0, batchnorm: bool = False
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        norm = (lambda: nn.BatchNorm2d(width)) if batchnorm else nn.Identity
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), norm(), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), norm(), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * width, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 4) of images (B, 1, 8, 8)."""
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``val_loss``."""
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``test_loss``."""
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer named by the hyperparameters."""
        name, lr = self.hparams["optimizer"], self.hparams["lr"]
        if name == "sgd":
            return torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9)
        optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(self.parameters(), lr=lr)
        return optimizer


def tiny_teacher() -> TinyNet:
    """A `TinyNet` of 32 channels, for ``teacher="module:function"``; a real one would load its weights."""
    return TinyNet(32)


class TinyHeads(TinyNet):
    """`TinyNet` with a second head, ``"light"``: the mean of the image, besides ``"quarter"``, its class."""

    def __init__(self, width: int = 16, lr: float = 1e-2, optimizer: str = "sgd") -> None:
        super().__init__(width, lr, optimizer)
        self.save_hyperparameters()
        self.light = nn.Linear(4 * width, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Logits (B, 4) and brightness (B, 1)."""
        features = self.net[:-1](x)
        return {"quarter": self.net[-1](features), "light": self.light(features)}

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        found = self(x)
        return F.cross_entropy(found["quarter"], y) + F.mse_loss(found["light"], Brightness()(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The sum of both losses."""
        loss = self._loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``val_loss``."""
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``test_loss``."""
        self.log("test_loss", self._loss(batch), sync_dist=True)


class Brightness(nn.Module):
    """A teacher that knows one task, by computing it: the mean (B, 1) of images (B, 1, 8, 8)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean of each image."""
        return x.flatten(1).mean(1, keepdim=True)


def tiny_data(samples: int = 64, seed: int = 0) -> TensorDataset:
    """Images (N, 1, 8, 8) whose class is the brightest quarter."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, 8, 8, generator=generator)
    quarters = F.adaptive_avg_pool2d(x, 2).flatten(1)
    return TensorDataset(x, quarters.argmax(1))


def tiny_loader(batch_size: int = 16, samples: int = 64, world_size: int = 1, rank: int = 0) -> DataLoader[Any]:
    """A loader whose global batches are the same for any number of processes: equal shards, no shuffling."""
    data = tiny_data(samples)
    sampler: DistributedSampler[Any] = DistributedSampler(data, world_size, rank, shuffle=False)
    return DataLoader(data, batch_size // world_size, sampler=sampler)


class TinyData(L.LightningDataModule):
    """`tiny_data` to train, validate and test on, for recipes.

    Args:
        batch_size: Samples in a batch.
        samples: Samples of each part.
    """

    def __init__(self, batch_size: int = 16, samples: int = 64) -> None:
        super().__init__()
        self.batch_size, self.samples = batch_size, samples

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled."""
        return DataLoader(tiny_data(self.samples), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Other samples."""
        return DataLoader(tiny_data(self.samples, seed=1), batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Others again."""
        return DataLoader(tiny_data(self.samples, seed=2), batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images to test on, without classes."""
        images: Any = tiny_data(self.samples, seed=2).tensors[0]
        return DataLoader(images, batch_size=self.batch_size)


class ResumableLoader:
    """Shuffled batches whose position and order can be saved: what exact resume in mid-epoch needs.

    The order of each epoch comes from a generator of the loader's own, seeded by `seed` and the epoch's number.

    Args:
        dataset: A map-style dataset of tensor tuples.
        batch_size: Samples in a batch, on this rank.
        seed: Seed of the shuffling.
        world_size: Number of processes among which each epoch's order is dealt out.
        rank: This process.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, seed: int = 0, world_size: int = 1, rank: int = 0
    ) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.world_size, self.rank = world_size, rank
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return len(self.dataset) // (self.batch_size * self.world_size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)[self.rank :: self.world_size]  # type: ignore[arg-type]
        while self.position < len(self):
            chosen = order[self.position * self.batch_size : (self.position + 1) * self.batch_size]
            self.position += 1
            items = [self.dataset[int(i)] for i in chosen]
            yield tuple(torch.stack(column) for column in zip(*items, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.epoch, self.position = state["epoch"], state["position"]


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 on the CPU, for tests: Lightning refuses exactly `FSDPStrategy` there, and passes no device to torch."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


def weight_norm(parameters: Sequence[Tensor]) -> float:
    """The sum of all absolute values in float64, of whole parameters or of this process's shards."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in (q.detach() for q in parameters)]
    return float(sum(p.double().abs().sum() for p in local))


# ----------------------------------------------------------------------------------------------------------- launcher
class RankFailed(AssertionError):
    """A process of a launch failed; the message holds its output."""


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(
    cases: Sequence[Callable[[], Any] | str], processes: int = 2, timeout: float = 120.0, nodes: bool = False
) -> dict[str, list[Any]]:
    """Run cases in a group of processes on this machine (gloo, CPU).

    Args:
        cases: Module-level functions without arguments, or their ``"module:name"``; run in order in each process.
        processes: Number of processes.
        timeout: Seconds after which the launch is killed.
        nodes: Pretend that each process is a machine of its own (``num_nodes=processes``, one device each).

    Returns:
        For each case by name, what each rank returned. An exception in a case becomes ``{"error": "Type: text"}``.

    Raises:
        RankFailed: If a process dies or does not finish in time.
    """
    names = [c if isinstance(c, str) else f"{c.__module__}:{c.__name__}" for c in cases]
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            log = open(Path(folder, f"log{rank}"), "w")  # noqa: SIM115 - closed with the process
            command = [
                sys.executable,
                "-m",
                "lightning_compress.callbacks.testing",
                "--out",
                f"{folder}/{rank}",
                *names,
            ]
            environment = _environment(rank, processes, port, nodes)
            started.append((subprocess.Popen(command, env=environment, stdout=log, stderr=log), log))
        try:
            for process, _ in started:
                process.wait(timeout)
        except subprocess.TimeoutExpired:
            for process, _ in started:
                process.kill()
        finally:
            for process, log in started:
                process.wait()
                log.close()
        if any(process.returncode for process, _ in started):
            tails = [Path(folder, f"log{rank}").read_text()[-3000:] for rank in range(processes)]
            raise RankFailed("\n".join(f"--- rank {rank}\n{tail}" for rank, tail in enumerate(tails)))
        results = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(processes)]
    return {name.partition(":")[2]: [result[name] for result in results] for name in names}


def _environment(rank: int, processes: int, port: int, nodes: bool) -> dict[str, str]:
    paths = [p for p in sys.path if p]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "NODE_RANK": str(rank if nodes else 0),
        "LOCAL_RANK": str(0 if nodes else rank),
        "OMP_NUM_THREADS": "1",
    }


def rank() -> int:
    """This process's rank in a launch; 0 outside of one."""
    return int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", 0))


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("cases", nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    environment, results = dict(os.environ), {}
    gc.freeze()  # what was imported stays: looking through it would take most of the time of each collection
    for name in arguments.cases:
        os.environ.update(environment)  # Lightning deletes WORLD_SIZE after a fit
        module, _, function = name.partition(":")
        try:
            results[name] = getattr(importlib.import_module(module), function)()
        except Exception as error:  # the result of the case; the caller decides whether it was expected
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, arguments.out)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main()
