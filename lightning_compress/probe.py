"""One example call of the model, and batches for calibration, without disturbing either model or run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from lightning_compress.errors import CompressionError
from lightning_compress.isolation import MemoryWatch, as_found, isolated_rng
from lightning_compress.nested import map_tensors
from lightning_compress.targets import get_submodule_clean, named_modules_clean, wrapped_module


@dataclass(frozen=True, eq=False)
class ExampleCall:
    """One call of a module with example arguments.

    Args:
        module: Clean name of the module; empty for the root.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Example:
        >>> call = ExampleCall("0", (torch.zeros(3, 2),))
        >>> call.run(nn.Sequential(nn.Linear(2, 5))).shape
        torch.Size([3, 5])
    """

    module: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, root: nn.Module) -> Any:
        """Call the module in eval mode, eagerly and without gradients; the model and RNG stay as found.

        Args:
            root: The possibly wrapped model, on the device of the arguments.

        Returns:
            What the module returns.

        Raises:
            CompressionError: If the model has no such module.
        """
        module = _entry(root, self.module)
        arguments = self._map(lambda tensor: tensor.detach().clone())  # the module may write to them
        with isolated_rng(), as_found(root):
            return module(*arguments.args, **arguments.kwargs)

    def to(self, device: torch.device | str | int) -> ExampleCall:
        """The same call with its tensors on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> ExampleCall:
        return ExampleCall(self.module, map_tensors(change, self.args), map_tensors(change, self.kwargs))


class Recording(NamedTuple):
    """What one step showed.

    Attributes:
        call: The first call of the smallest module that owns all targets which ran.
        ran: Clean names of the modules that were called, in the order in which they started.
        used: Clean names of the modules that were called, or whose own parameters were read by something else: the
            output projection of `nn.MultiheadAttention` and tied embeddings are never called. Reads of sharded
            parameters go unseen under FSDP2.
    """

    call: ExampleCall
    ran: tuple[str, ...]
    used: frozenset[str]


def from_example_inputs(inputs: Any, module: str = "") -> ExampleCall:
    """A call from what a user gives, read as Lightning reads `example_input_array`.

    Args:
        inputs: A tensor, a tuple or list of positional arguments, a dict of keyword arguments, or a call.
        module: Clean name of the module to call.

    Raises:
        TypeError: If it is something else.

    Example:
        >>> from_example_inputs({"x": torch.zeros(1)}).kwargs
        {'x': tensor([0.])}
    """
    if isinstance(inputs, ExampleCall):
        return inputs
    if isinstance(inputs, Tensor):
        return ExampleCall(module, (inputs,))
    if isinstance(inputs, tuple | list):
        return ExampleCall(module, tuple(inputs))
    if isinstance(inputs, dict) and all(isinstance(key, str) for key in inputs):
        return ExampleCall(module, (), dict(inputs))
    raise TypeError(
        f"example_inputs is a {type(inputs).__name__}; give a tensor, a tuple of positional arguments or a dict of "
        f"keyword arguments by name."
    )


def record_call(
    root: nn.Module,
    step: Callable[[], Any],
    targets: Sequence[str],
    muted: AbstractContextManager[Any] | None = None,
) -> Recording:
    """Run one step and keep the arguments with which the model was called.

    The step runs in eval mode, eagerly and without gradients; the model, its metrics and all random numbers are as
    before afterwards. Modules count as run when they are called: `self.net.forward(x)` goes unseen.

    Args:
        root: The possibly wrapped model.
        step: What to run, such as `lambda: pl_module.training_step(batch, 0)`.
        targets: Clean names that the call should cover. Those that never ran are ignored.
        muted: Entered around the step, to keep it from logging.

    Raises:
        CompressionError: If the step fails, if no target ran, or if no single module call covers the targets.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
        >>> recording = record_call(model, lambda: model(torch.ones(3, 4)), ["0.0"])
        >>> recording.call.module, recording.ran
        ('0.0', ('', '0', '0.0', '0.1', '1'))
    """
    if not targets:
        raise ValueError("targets is empty; name the modules that the example call should cover.")
    above = {ancestor for target in targets for ancestor in _ancestors(target)}
    calls: dict[str, ExampleCall] = {}
    ran: dict[str, None] = {}
    with nullcontext() if muted is None else muted, isolated_rng(), as_found(root) as watch, ExitStack() as hooks:
        for name, module in named_modules_clean(root):
            hook = _Recorder(name, calls if name in above else None, ran)
            # Before other hooks: running the call again will run those again.
            handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            hooks.callback(handle.remove)
        try:
            step()
        except Exception as error:
            raise CompressionError(
                f"The example step raised {type(error).__name__}: {error}. It ran one batch in eval mode without "
                f"gradients, which steps with manual optimization or gradient penalties do not survive. Pass "
                f"example_inputs=, or set example_input_array on the module."
            ) from error
        used = frozenset(ran) | _read(root, watch)
    return Recording(_smallest(calls, [t for t in dict.fromkeys(targets) if t in used], ran, targets), tuple(ran), used)


@dataclass
class _Recorder:
    name: str
    calls: dict[str, ExampleCall] | None
    ran: dict[str, None]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran.setdefault(self.name)
        if self.calls is not None and self.name not in self.calls:
            call = ExampleCall(self.name, args, kwargs)
            self.calls[self.name] = call._map(lambda tensor: tensor.detach().clone())


def _smallest(
    calls: dict[str, ExampleCall], reached: list[str], ran: dict[str, None], targets: Sequence[str]
) -> ExampleCall:
    if not reached:
        raise CompressionError(
            f"The example step called none of the targets ({_some(targets)}); it called {_some(ran)}. Choose targets "
            f"that training uses, or pass example_inputs=."
        )
    common = set(_ancestors(reached[0])).intersection(*(_ancestors(name) for name in reached[1:]))
    for name in sorted(common, key=len, reverse=True):
        if name in calls:
            return calls[name]
    tops = [name for name in ran if not any(parent in ran for parent in _ancestors(name)[1:])]
    if not tops:
        raise CompressionError(
            f"The example step called no module at all, though it read the weights of {_some(reached)}. Call the "
            f"model as `self(x)` or `self.net(x)`, not through `forward` or functions of its weights, or pass "
            f"example_inputs=."
        )
    raise CompressionError(
        f"No single module call covers the targets {_some(reached)}: the step called {_some(tops)} one after the "
        f"other. Give the module a forward() and pass example_inputs=, or use targets inside one of these."
    )


def _ancestors(name: str) -> list[str]:
    """The name, its parents from near to far, and the root."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _read(root: nn.Module, watch: MemoryWatch) -> set[str]:
    """Modules with a parameter that some operator took."""
    return {
        name
        for name, module in named_modules_clean(root)
        if any(watch.touched(parameter) for parameter in module.parameters(recurse=False))
    }


def _entry(root: nn.Module, name: str) -> nn.Module:
    """What to call: sharding and checkpointing wrappers do needed work, compilers and replicas do not."""
    module = get_submodule_clean(root, name, keep_wrappers=True)
    while (inner := wrapped_module(module)) is not None and ({"_orig_mod", "module"} & module._modules.keys()):
        module = inner
    return module


def _some(names: Sequence[str] | dict[str, None], most: int = 6) -> str:
    listed = [name or "the root" for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "") or "nothing"


def calibration_batches(
    dataset: Any,
    batch_size: int,
    count: int,
    seed: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> tuple[Iterator[Any], list[int]]:
    """Batches for calibration, from an iterator of their own.

    The samples depend on the dataset, `count` and `seed` only: they are the same on every process, for every batch
    size, and random augmentation repeats too. No global random number is used up.

    Args:
        dataset: A map-style dataset, from which samples are drawn without replacement, or an iterable one, whose
            first samples are taken (one that shards itself by process gives each process its own).
        batch_size: Samples in a batch; the last batch may have fewer.
        count: Samples in all; all samples if the dataset has fewer.
        seed: Which samples, and their augmentation.
        collate_fn: Makes a batch of a list of samples; PyTorch's default otherwise.

    Returns:
        The batches, and the indices of the samples. The indices of an iterable dataset are positions, and the list
        grows as the batches are drawn.

    Raises:
        CompressionError: If the dataset has no sample.
        ValueError: If `batch_size` or `count` is not positive.

    Example:
        >>> batches, ids = calibration_batches(list(range(100)), batch_size=2, count=3, seed=0)
        >>> [batch.tolist() for batch in batches], ids
        ([[49, 97], [53]], [49, 97, 53])
    """
    if batch_size < 1 or count < 1:
        raise ValueError(f"batch_size and count are at least 1; found {batch_size} and {count}.")
    collate = default_collate if collate_fn is None else collate_fn
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        ids: list[int] = []
        return _first_samples(dataset, batch_size, count, seed, collate, ids), ids
    length = len(dataset)
    if length == 0:
        raise CompressionError("The dataset for calibration is empty. Pass another one.")
    ids = random.Random(seed).sample(range(length), min(count, length))
    return _chosen_samples(dataset, batch_size, seed, collate, ids), ids


def _chosen_samples(
    dataset: Any, batch_size: int, seed: int, collate: Callable[[list[Any]], Any], ids: list[int]
) -> Iterator[Any]:
    for start in range(0, len(ids), batch_size):
        samples = []
        for index in ids[start : start + batch_size]:
            with isolated_rng(_sample_seed(seed, index)):
                samples.append(dataset[index])
        yield collate(samples)


def _first_samples(
    dataset: Any, batch_size: int, count: int, seed: int, collate: Callable[[list[Any]], Any], ids: list[int]
) -> Iterator[Any]:
    with isolated_rng(_sample_seed(seed, -1)):
        samples = iter(dataset)
    while len(ids) < count:
        batch: list[Any] = []
        while len(batch) < min(batch_size, count - len(ids)):
            with isolated_rng(_sample_seed(seed, len(ids) + len(batch))):  # never held open while the caller works
                found = list(islice(samples, 1))
            if not found:
                break
            batch += found
        if not batch:
            break
        ids.extend(range(len(ids), len(ids) + len(batch)))
        yield collate(batch)
    if not ids:
        raise CompressionError("The iterable dataset for calibration gave no sample. Pass another one.")


def _sample_seed(seed: int, index: int) -> int:
    return random.Random(f"{seed} {index}").getrandbits(32)  # text seeds are hashed, so neighbours are unrelated
