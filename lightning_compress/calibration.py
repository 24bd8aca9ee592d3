"""Calls of a model with real inputs, made of whatever holds the data: loaders, datasets, data modules, batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.probe import ExampleCall, calibration_batches, from_example_inputs
from lightning_compress.targets import get_submodule_clean, unwrap

SAMPLES = 512  # taken from a loader or dataset
BATCH = 32


def calibration_calls(
    model: nn.Module,
    data: Any,
    example: ExampleCall | None = None,
    prepare: Callable[[Any], Any] | None = None,
    samples: int = SAMPLES,
    batch_size: int = BATCH,
    seed: int = 0,
) -> Iterator[ExampleCall]:
    """Calls of a model with batches of real inputs.

    Args:
        model: The possibly wrapped model.
        data: A `DataLoader` or dataset, or something with `train_dataloader()`, such as a LightningDataModule (it is
            prepared and set up if it has to be): up to `samples` samples are taken, the same ones in each run, without
            using up random numbers. Or an iterable of batches or of calls, all of which are taken; or one tensor.
        example: Shows how many positional arguments the model takes; default: as many as its `forward` requires.
        prepare: Takes a batch and returns the model's arguments: a tensor, a tuple, or a dict of keyword arguments.
            Default: of a tuple or list the first elements, of a dict the entries that are named like parameters.
        samples: How many at most, at least 1.
        batch_size: For a dataset; loaders have their own.
        seed: Which samples of a dataset or loader.

    Yields:
        One call a batch.

    Raises:
        CompressionError: There is no data in it, or a batch has not what the model takes.

    Example:
        >>> import torch
        >>> data = [(torch.zeros(2, 4), torch.zeros(2)), (torch.ones(2, 4), torch.zeros(2))]
        >>> [call.args[0].shape for call in calibration_calls(nn.Linear(4, 3), data)]
        [torch.Size([2, 4]), torch.Size([2, 4])]
    """
    if example is None and isinstance(shown := getattr(unwrap(model), "example_input_array", None), Tensor | tuple):
        example = from_example_inputs(shown)
    module = "" if example is None else example.module
    forward = get_submodule_clean(model, module).forward
    for batch in batches(data, samples, batch_size, seed):
        if isinstance(batch, ExampleCall):
            yield batch
        elif _length(batch) == 0:
            raise CompressionError("a batch for calibration is empty: it has no samples to look at")
        else:
            yield _call(batch, module, forward, example, prepare)


def batches(data: Any, samples: int = SAMPLES, batch_size: int = BATCH, seed: int = 0) -> Iterator[Any]:
    """Batches of whatever holds the data; arguments are those of `calibration_calls`."""
    if isinstance(data, Tensor | ExampleCall | Mapping):
        yield data
    elif callable(getattr(data, "train_dataloader", None)):
        for loader in _loaders(_train_loader(data)):
            yield from batches(loader, samples, batch_size, seed)
    elif hasattr(data, "iterables"):  # Lightning's CombinedLoader
        for loader in _loaders(data):
            yield from batches(loader, samples, batch_size, seed)
    elif isinstance(data, DataLoader):
        yield from _of_loader(data, samples, seed)
    elif isinstance(data, Dataset):
        yield from calibration_batches(data, batch_size, samples, seed)[0]
    elif isinstance(data, Iterable):
        yield from _isolated(data, seed)
    else:
        raise TypeError(
            "calibration is a DataLoader, a dataset, something with train_dataloader(), or an iterable of batches; "
            f"got {type(data).__name__}"
        )


def _train_loader(data: Any) -> Any:
    """What its `train_dataloader` gives; set up first if it cannot give anything yet."""
    with isolated_rng(seed=0):
        try:
            return data.train_dataloader()
        except Exception as early:
            if not callable(getattr(data, "setup", None)):
                raise
            try:
                if callable(getattr(data, "prepare_data", None)):
                    data.prepare_data()
                data.setup("fit")
                return data.train_dataloader()
            except Exception as error:
                raise CompressionError(
                    f"{type(data).__name__} gives no training data for calibration: {type(error).__name__}: {error} "
                    f"(before its setup('fit'): {type(early).__name__}: {early}); pass a DataLoader or batches"
                ) from error


def _loaders(found: Any) -> Iterator[Any]:
    """One loader, or the loaders in a list, a dict or a `CombinedLoader`."""
    found = getattr(found, "iterables", found)
    if isinstance(found, Mapping):
        found = list(found.values())
    if isinstance(found, list | tuple):
        for inner in found:
            yield from _loaders(inner)
    else:
        yield found


def _of_loader(loader: DataLoader[Any], samples: int, seed: int) -> Iterator[Any]:
    standard = type(loader.batch_sampler) is BatchSampler and type(loader.sampler) in (RandomSampler, SequentialSampler)
    if standard:  # not the loader itself: it would use up its generator and its workers
        size = loader.batch_size or BATCH
        yield from calibration_batches(loader.dataset, size, samples, seed, collate_fn=loader.collate_fn)[0]
        return
    left = samples
    for batch in _isolated(loader, seed):
        yield batch
        left -= _length(batch)
        if left <= 0:
            return


def _isolated(data: Iterable[Any], seed: int) -> Iterator[Any]:
    """Batches without using up random numbers, and without holding them back while the caller works."""
    with isolated_rng(seed):
        iterator = iter(data)
    while True:
        with isolated_rng():
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def _length(batch: Any) -> int:
    while isinstance(batch, tuple | list | Mapping) and len(batch):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch) if isinstance(batch, Tensor) and batch.dim() else 1


def _call(
    batch: Any,
    module: str,
    forward: Callable[..., Any],
    example: ExampleCall | None,
    prepare: Callable[[Any], Any] | None,
) -> ExampleCall:
    if prepare is not None:
        return from_example_inputs(prepare(batch), module)
    if isinstance(batch, Tensor):
        return ExampleCall(module, (batch,))
    if isinstance(batch, Mapping):
        return ExampleCall(module, (), _keywords(batch, forward, example))
    if isinstance(batch, tuple | list):
        return ExampleCall(module, _positional(batch, forward, example))
    raise CompressionError(
        f"a batch for calibration is a {type(batch).__name__}; pass `prepare=`, a function of a batch that returns the "
        "model's arguments"
    )


def _keywords(batch: Mapping[str, Any], forward: Callable[..., Any], example: ExampleCall | None) -> dict[str, Any]:
    if example is not None and example.kwargs:
        names: set[str] = set(example.kwargs)
    else:
        parameters = inspect.signature(forward).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        names = set(batch) if takes_all else set(parameters)
    found = {name: batch[name] for name in batch if name in names}
    if not found:
        raise CompressionError(
            f"a batch has the entries {sorted(map(str, batch))}, and the model takes {sorted(names)}; pass `prepare=`, "
            "a function of a batch that returns the model's arguments"
        )
    return found


def _positional(batch: Sequence[Any], forward: Callable[..., Any], example: ExampleCall | None) -> tuple[Any, ...]:
    if example is not None:
        wanted = len(example.args)
    else:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [p for p in inspect.signature(forward).parameters.values() if p.kind in kinds]
        wanted = max(1, sum(p.default is inspect.Parameter.empty for p in parameters))
    if len(batch) < wanted:
        raise CompressionError(
            f"a batch has {len(batch)} elements and the model takes {wanted} positional arguments; pass `prepare=`, a "
            "function of a batch that returns the model's arguments"
        )
    return tuple(batch[:wanted])
