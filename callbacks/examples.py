"""An example call of the user's model, for planning: from what the user gives, or from one training batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.isolation import as_found, isolated_rng
from lightning_compress.nested import map_tensors
from lightning_compress.probe import ExampleCall, calibration_batches, from_example_inputs, record_call

if TYPE_CHECKING:
    from lightning import LightningModule

    from lightning_compress.callbacks.coordinator import Coordinator

_SAMPLES = 2  # planning needs shapes, not statistics
_BATCH = 32


def example_call(run: Coordinator, example_inputs: Any, targets: Sequence[str], owner: str) -> ExampleCall:
    """One example call that covers the target layers.

    Taken from `example_inputs`, else from ``example_input_array``, else recorded from the current training batch with
    logging muted. Every rank records, since the user's step may contain collectives.

    Args:
        run: The coordinator.
        example_inputs: Arguments of the LightningModule's ``forward``, or ``None``.
        targets: Clean names of the layers to cover.
        owner: For messages.

    Raises:
        CompressionError: If there is nothing to take it from.
    """
    module = run.pl_module
    given = example_inputs if example_inputs is not None else module.example_input_array
    if given is not None:
        if not is_overridden("forward", module):
            raise CompressionError(
                f"{owner}: example inputs are arguments of `forward`, and {type(module).__name__} has none; define it, "
                "or leave them out where the training step can be rehearsed (automatic optimization)"
            )
        return from_example_inputs(given).to(next(module.parameters()).device)
    if run.batch is None or not module.automatic_optimization:
        why = "there is no training batch yet" if run.batch is None else "a manually optimized step cannot be rehearsed"
        raise CompressionError(
            f"{owner}: an example call of the model is needed and {why}; pass example_inputs= (arguments of the "
            "module's forward, for a small batch) or define `example_input_array`"
        )
    return smaller(record_step(run, targets))


def record_step(run: Coordinator, targets: Sequence[str]) -> ExampleCall:
    """The call that the user's training step makes for the current batch, with all of its samples."""
    return record_call(run.pl_module, lambda: run_step(run), targets, muted(run.pl_module)).call


@contextmanager
def rehearsal(run: Coordinator) -> Iterator[None]:
    """Run steps in evaluation mode, without gradients, logging or any other trace on the module."""
    with muted(run.pl_module), isolated_rng(), as_found(run.pl_module):
        yield


def run_step(run: Coordinator) -> Any:
    """The user's own training step on the current batch."""
    step = run.pl_module.training_step
    step = getattr(step, "inner", step)  # the user's own step: no teacher is needed for an example
    arguments = [run.batch, 0] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else [run.batch]
    with run.trainer.precision_plugin.forward_context():
        return step(*arguments)


@contextmanager
def muted(module: LightningModule) -> Iterator[None]:
    """Let the module log nothing inside the block."""
    before = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    module.__dict__.update(log=_ignore, log_dict=_ignore)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for `LightningModule.log`."""


def has_samples(run: Coordinator) -> bool:
    """Whether samples can be drawn from the training data without touching the loader that the fit reads."""
    return getattr(run.trainer.train_dataloader, "dataset", None) is not None


def training_batches(
    run: Coordinator, samples: int, size: int | None = None, seen: Sequence[Any] = ()
) -> Iterator[Any]:
    """Batches of their own from the training data, as `training_step` gets them.

    The samples are the same for any number of processes.

    Args:
        run: The coordinator.
        samples: How many.
        size: Samples in a batch; default: as the loader has them, hence fewer in each of several processes.
        seen: What there is instead where the loader has no dataset (see `has_samples`); default: the current batch.
    """
    if not has_samples(run):
        yield from seen or [run.batch]
        return
    loader: Any = run.trainer.train_dataloader
    size = size or getattr(loader, "batch_size", None) or _BATCH
    batches, _ = calibration_batches(loader.dataset, size, samples, 0, getattr(loader, "collate_fn", None))
    for batch in batches:
        yield run.adapter.prepared(batch)


def smaller(call: ExampleCall) -> ExampleCall:
    """The call with the first two samples, if all its tensors agree on the number of samples."""
    sizes: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        sizes.add(tensor.shape[0] if tensor.dim() else 0)
        return tensor

    map_tensors(note, (call.args, call.kwargs))
    if len(sizes) != 1 or min(sizes) <= _SAMPLES:
        return call
    return ExampleCall(
        call.module,
        map_tensors(lambda t: t[:_SAMPLES].clone(), call.args),
        map_tensors(lambda t: t[:_SAMPLES].clone(), call.kwargs),
    )


def to_state(call: ExampleCall | None) -> dict[str, Any] | None:
    """Plain data for a checkpoint, so that a resumed fit measures alike; ``None`` if it is not plain."""
    if call is None or not _is_plain((call.args, call.kwargs)):
        return None
    return {
        "module": call.module,
        "args": list(map_tensors(lambda t: t.detach().cpu(), call.args)),
        "kwargs": map_tensors(lambda t: t.detach().cpu(), dict(call.kwargs)),
    }


def from_state(state: dict[str, Any] | None) -> ExampleCall | None:
    """The inverse of `to_state`."""
    return None if state is None else ExampleCall(state["module"], tuple(state["args"]), dict(state["kwargs"]))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or type(value) in (Tensor, str, int, float, bool)
