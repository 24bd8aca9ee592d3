"""The examples of an audit: the same ones in every run, with ids, without using up random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_compress.audits.handles import count, take
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.nested import map_tensors, tensors_in

Prepare = Callable[[Any], tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs, targets and ids of the same examples.

    Attributes:
        inputs: A tensor (N, ...), or a tuple or dict of them.
        targets: (N, ...).
        ids: (N,) int64, positions in the data set; what makes two audits comparable, and members tell apart.
        total: How many there were to choose from; None if unknown.
        source: Where they come from, in words.
    """

    inputs: Any
    targets: Any
    ids: Tensor
    total: int | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Examples:
        """Some of them; `index` is a slice or a tensor of positions."""
        parts = (take(self.inputs, index), take(self.targets, index), self.ids[index])
        return Examples(*parts, total=self.total, source=self.source)


def collect(
    data: Any, split: Prepare, examples: int | None = None, seed: int = 0, rank: int = 0, world: int = 1
) -> Examples:
    """Take examples out of whatever holds them.

    Of a map-style data set a random choice is taken, which depends on the seed alone and so is the same for any batch
    size and number of processes; of an iterable the first ones.

    Args:
        data: `Examples`, a pair of tensors, a DataLoader, a dataset, an iterable of batches, or something with
            `test_dataloader()` or `val_dataloader()`, such as a LightningDataModule.
        split: Takes a batch and returns inputs and targets.
        examples: How many; None for all.
        seed: Of the choice.
        rank: Which share of the choice: ``ids[rank::world]``.
        world: Number of shares.

    Raises:
        CompressionError: There are no examples, or they do not fit into one tensor.
        TypeError: The data is of no such kind.
    """
    if isinstance(data, Examples):
        chosen = _choose(len(data), examples, seed)[rank::world]
        return data[chosen]
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        total = len(data[1])
        whole = Examples(data[0], data[1], torch.arange(total), total, "tensors")
        return whole[_choose(total, examples, seed)[rank::world]]
    loader, source = _loader(data)
    indexed = _indexed(loader)
    with isolated_rng(seed):
        if indexed is not None:
            return _of_dataset(*indexed, split, examples, seed, rank, world, source)
        return _of_batches(loader, split, examples, rank, world, source)


def _choose(total: int, examples: int | None, seed: int) -> Tensor:
    if examples is None or examples >= total:
        return torch.arange(total)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:examples].sort().values


def _loader(data: Any) -> tuple[Any, str]:
    """The held-out part of the data; a data module is set up first if it cannot give anything yet."""
    for name, stage in (("test_dataloader", "test"), ("val_dataloader", "validate")):
        if callable(getattr(data, name, None)):
            found = _held_out(data, name, stage)
            if found is not None:
                return found, name
    if isinstance(data, DataLoader | Dataset) or (
        isinstance(data, Iterable) and not isinstance(data, Tensor | Mapping)
    ):
        return data, type(data).__name__
    raise TypeError(
        "data is a DataLoader, a dataset, a pair (inputs, targets), an iterable of batches, or something with "
        f"test_dataloader() or val_dataloader(); got {type(data).__name__}"
    )


def _held_out(data: Any, name: str, stage: str) -> Any:
    with isolated_rng(seed=0):
        if callable(getattr(data, "prepare_data", None)):
            data.prepare_data()
        if callable(getattr(data, "setup", None)):
            data.setup(stage)
        try:
            found = getattr(data, name)()
        except Exception as error:
            # Lightning's own classes raise its MisconfigurationException where a loader was not defined.
            if type(error).__name__ == "MisconfigurationException" or isinstance(error, NotImplementedError):
                return None
            raise
    while isinstance(found, list | tuple) and found:
        found = found[0]
    return found


def _indexed(loader: Any) -> tuple[Any, Callable[[list[Any]], Any], int] | None:
    """Data set, collate function and batch size, where examples can be fetched by their index."""
    if isinstance(loader, DataLoader):
        dataset, collate, size = loader.dataset, loader.collate_fn, loader.batch_size
        if size is None:
            return None
    elif isinstance(loader, Dataset):
        dataset, collate, size = loader, default_collate, 64
    else:
        return None
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    return dataset, collate, size


def _of_dataset(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    size: int,
    split: Prepare,
    examples: int | None,
    seed: int,
    rank: int,
    world: int,
    source: str,
) -> Examples:
    total = len(dataset)
    ids = _choose(total, examples, seed)[rank::world]
    parts = []
    for start in range(0, len(ids), size):
        parts.append(split(collate([dataset[int(i)] for i in ids[start : start + size]])))
    return _joined(parts, ids, total, source)


def _of_batches(
    loader: Iterable[Any], split: Prepare, examples: int | None, rank: int, world: int, source: str
) -> Examples:
    parts, seen = [], 0
    for batch in loader:
        parts.append(split(batch))
        seen += count(parts[-1][1])
        if examples is not None and seen >= examples:
            break
    kept = _joined(parts, torch.arange(seen), None, source)
    return kept[torch.arange(seen)[:examples][rank::world]]


def _joined(parts: list[tuple[Any, Any]], ids: Tensor, total: int | None, source: str) -> Examples:
    if not parts:
        raise CompressionError("the data for the audit has no example; an audit needs some that were not trained on")
    parts = [(_own(inputs), _own(targets)) for inputs, targets in parts]
    try:
        inputs, targets = (_cat([part[i] for part in parts]) for i in range(2))
    except RuntimeError as error:
        shapes = sorted({tuple(next(tensors_in(part[0])).shape[1:]) for part in parts})[:4]
        raise CompressionError(
            f"examples of different shapes {shapes} do not fit into one tensor; pad or resize them in the data set "
            f"({error})"
        ) from error
    return Examples(inputs, targets, ids, total, source)


def _own(value: Any) -> Any:
    """Copies made outside of inference mode, so that they take part in gradients."""
    with torch.inference_mode(False):
        return map_tensors(lambda tensor: tensor.detach().clone(), value)


def _cat(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, Mapping):
        return {key: _cat([value[key] for value in values]) for key in first}
    return tuple(_cat([value[i] for value in values]) for i in range(len(first)))
