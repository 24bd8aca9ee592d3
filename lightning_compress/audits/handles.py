"""What is audited: the model that ships, something to take gradients of, and the space its inputs live in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.nested import map_tensors, tensors_in

Via = Literal["direct", "ste", "twin"]
Values = Tensor | float | Sequence[float]
_VALUES_AT_ONCE = 1 << 22  # 27 images of 3 x 224 x 224
_TOLERANCE = 1e-5  # of the range: float images that were saved as bytes miss their bounds by this much at most


@dataclass(frozen=True, eq=False)
class InputSpace:
    """Where raw inputs live, and how they are normalised before the model sees them.

    Audits work in raw inputs, so that an eps of 8/255 means the same for every model. The model sees
    ``(x - mean) / std``. Each value is a number, a sequence with one number a channel or feature (dimension 1 of a
    batch), or a tensor that broadcasts against one example.

    Args:
        low: The smallest value an input can have.
        high: The largest.
        mean: Subtracted before the model; None if the model, or nobody, normalises.
        std: Divided by before the model.
        mutable: What an attacker may change (True), such as the features of a table that are not facts; None: all.

    Example:
        >>> space = InputSpace(0.0, 1.0, mean=[0.5], std=[0.25])
        >>> space.normalize(torch.full((1, 1, 1, 2), 0.75)).tolist()
        [[[[1.0, 1.0]]]]
    """

    low: Values
    high: Values
    mean: Values | None = None
    std: Values | None = None
    mutable: Tensor | None = None

    def __post_init__(self) -> None:
        low, high = torch.as_tensor(self.low), torch.as_tensor(self.high)
        if not bool((low < high).all()):
            raise ValueError(f"an input space needs low < high everywhere; got low={self.low}, high={self.high}")
        if self.std is not None and not bool((torch.as_tensor(self.std) > 0).all()):
            raise ValueError(f"std must be positive; got {self.std}")

    @classmethod
    def observed(cls, x: Tensor) -> InputSpace:
        """The range that a batch of examples has, per feature for tables (N, F) and over all values otherwise."""
        if x.dim() == 2:
            low, high = x.min(0).values, x.max(0).values
            return cls(low, torch.where(high > low, high, low + 1))
        least, most = float(x.min()), float(x.max())
        return cls(least, most if most > least else least + 1)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`low` and `high` as tensors that broadcast against the batch `x` (N, ...)."""
        return _like(self.low, x), _like(self.high, x)

    def clip(self, x: Tensor) -> Tensor:
        """`x` (N, ...) with every value inside the bounds."""
        low, high = self.bounds(x)
        return torch.maximum(torch.minimum(x, high), low)

    def keep(self, x: Tensor, original: Tensor) -> Tensor:
        """`x` where an attacker may change it, `original` elsewhere; both (N, ...)."""
        return x if self.mutable is None else torch.where(_like(self.mutable, x).bool(), x, original)

    def normalize(self, x: Tensor) -> Tensor:
        """What the model sees of raw inputs (N, ...)."""
        if self.mean is not None:
            x = x - _like(self.mean, x)
        return x if self.std is None else x / _like(self.std, x)

    def denormalize(self, x: Tensor) -> Tensor:
        """Raw inputs of what a loader normalised already, (N, ...)."""
        if self.std is not None:
            x = x * _like(self.std, x)
        return x if self.mean is None else x + _like(self.mean, x)

    def check(self, x: Tensor, what: str = "the data") -> None:
        """Make sure that inputs are raw ones.

        Args:
            x: Inputs (N, ...).
            what: What they are, for the message.

        Raises:
            CompressionError: Values lie outside the bounds, or are not finite.
        """
        if not bool(torch.isfinite(x).all()):
            raise CompressionError(f"{what} holds values that are not finite; remove those examples before the audit")
        low, high = self.bounds(x)
        room = _TOLERANCE * (high - low)
        outside = (x < low - room) | (x > high + room)
        if bool(outside.any()):
            raise CompressionError(
                f"{what} has values in [{float(x.min()):.4g}, {float(x.max()):.4g}], outside the declared bounds "
                f"[{float(low.min()):.4g}, {float(high.max()):.4g}] ({float(outside.float().mean()):.1%} of them). Was "
                "it normalised already? An attack would clip it and measure another model. Declare the raw range, and "
                "pass the normalisation as `mean=` and `std=` with `normalized=True`, or give raw inputs"
            )


def _like(value: Any, x: Tensor) -> Tensor:
    """A value that broadcasts against a batch; a vector belongs to dimension 1."""
    dtype = x.dtype if x.is_floating_point() else torch.float32
    tensor = torch.as_tensor(value, device=x.device)
    tensor = tensor if tensor.dtype == torch.bool else tensor.to(dtype)
    if tensor.dim() == 1 and x.dim() > 2:
        return tensor.view(-1, *[1] * (x.dim() - 2))
    return tensor


def take(inputs: Any, index: Any) -> Any:
    """Some examples of inputs: every tensor in lists, tuples and dicts is indexed along dimension 0."""
    return map_tensors(lambda tensor: tensor[index], inputs)


def count(inputs: Any) -> int:
    """How many examples inputs hold."""
    return len(next(tensors_in(inputs)))


def rows_at_once(inputs: Any, most: int) -> int:
    """How many examples a model is given in one call: memory is bounded by values, of which large inputs have many.

    Args:
        inputs: (N, ...), or a tuple or dict of such tensors.
        most: Of small inputs.

    Example:
        >>> rows_at_once(torch.empty(90, 1, 28, 28), 64), rows_at_once(torch.empty(90, 3, 224, 224), 64)
        (64, 27)
    """
    values = sum(tensor.shape[1:].numel() for tensor in tensors_in(inputs))
    return max(1, min(most, _VALUES_AT_ONCE // max(1, values)))


@dataclass(frozen=True, eq=False)
class ModelHandle:
    """A model under audit: what ships gives every reported answer, a twin only gives gradients.

    Integer models have no gradient, and stock attacks on them say "robust" (or worse, some float path leaks a useless
    one). The straight-through estimator attacks what ships: ``twin(x) + (deployed(x) - twin(x)).detach()`` has the
    values of the one and the gradient of the other.

    Args:
        deployed: What ships: a module, an integer artefact (anything with `run`), or a function of a batch.
        twin: A differentiable model that computes nearly the same, such as the fake-quantized one it came from.
        dense: The uncompressed model, the twin of last resort.
        space: Of float inputs; None for token ids, or if inputs are never changed.
        select: Takes what a model returns and gives the logits; default: the first tensor, or `logits` of it.
        batch_size: Most examples a call; fewer of large inputs (`rows_at_once`). Changes no answer.
        straight_through: False: gradients and values of the twin alone (a transfer attack).

    Example:
        >>> handle = ModelHandle(nn.Linear(2, 3), space=InputSpace(0.0, 1.0))
        >>> handle.via, handle.predict(torch.zeros(4, 2)).shape
        ('direct', torch.Size([4, 3]))
    """

    deployed: Any
    twin: nn.Module | None = None
    dense: nn.Module | None = None
    space: InputSpace | None = None
    select: Callable[[Any], Tensor] | None = None
    batch_size: int = 256
    straight_through: bool = True

    @property
    def via(self) -> Via:
        """Where gradients come from."""
        if self.gradient_model is self.deployed:
            return "direct"
        return "ste" if self.straight_through else "twin"

    @property
    def gradient_model(self) -> Any:
        """What is differentiated: the twin; else the deployed module itself; else the dense model."""
        if self.twin is not None:
            return self.twin
        if isinstance(self.deployed, nn.Module) and not is_integer(self.deployed):
            return self.deployed
        return self.deployed if self.dense is None else self.dense

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What the guard has to watch."""
        return tuple({id(m): m for m in (self.deployed, self.twin, self.dense) if isinstance(m, nn.Module)}.values())

    def through(self, twin: nn.Module) -> ModelHandle:
        """The same model with gradients of `twin`."""
        return replace(self, twin=twin)

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Logits of what ships.

        Args:
            x: Raw inputs (N, ...), or a tuple or dict of them.

        Returns:
            Its answers (N, ...), in float32 at least, without gradients.
        """
        total, size = count(x), rows_at_once(x, self.batch_size)
        if total <= size:
            return self._call(self.deployed, x).detach()
        parts = (take(x, slice(i, i + size)) for i in range(0, total, size))
        return torch.cat([self._call(self.deployed, part).detach() for part in parts])

    def differentiable(self, x: Any) -> Tensor:
        """Logits with a gradient to `x`, which is taken in one call, whatever `batch_size` is.

        Args:
            x: Raw inputs (N, ...).

        Raises:
            CompressionError: Nothing here has a gradient.
        """
        model = self.gradient_model
        soft = self._call(model, x)
        asked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in(x))
        if asked and not soft.requires_grad:
            raise CompressionError(
                f"the answers of {_name(model)} have no gradient to its input, so no gradient-based audit of it means "
                "anything; pass `twin=`, the fake-quantized or dequantized model it was made of, or `dense=`"
            )
        if self.via != "ste":
            return soft
        return soft + (self.predict(x) - soft).detach()

    def view(self) -> LogitsView:
        """The handle as a module from raw inputs to logits, for libraries that ask for one."""
        return LogitsView(self)

    def _call(self, model: Any, x: Any) -> Tensor:
        if self.space is not None and isinstance(x, Tensor) and x.is_floating_point():
            x = self.space.normalize(x)
        run = model.run if not isinstance(model, nn.Module) and hasattr(model, "run") else model
        own, home = _weight(model), next(tensors_in(x)).device
        if own is not None:  # also in its precision: a model in half or double takes no other inputs
            x = map_tensors(lambda t: t.to(own.device, own.dtype if t.is_floating_point() else t.dtype), x)
        args, kwargs = ((), x) if isinstance(x, Mapping) else (x if isinstance(x, tuple | list) else (x,), {})
        out = run(*args, **kwargs)
        logits = logits_of(out) if self.select is None else self.select(out)
        return (logits if logits.dtype == torch.float64 else logits.float()).to(home)


class LogitsView(nn.Module):
    """A handle as a module from raw inputs (N, ...) to logits; it holds no parameters of its own."""

    def __init__(self, handle: ModelHandle) -> None:
        super().__init__()
        self.training = False
        object.__setattr__(self, "handle", handle)  # not a submodule: nobody shall train, move or save through a view

    def forward(self, x: Any) -> Tensor:
        """The logits, with gradients where there are any to be had."""
        handle: ModelHandle = self.handle  # type: ignore[assignment]
        return handle.differentiable(x) if torch.is_grad_enabled() else handle.predict(x)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: itself, `logits` of it, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = next(tensors_in(output), None)
    if found is None:
        raise CompressionError(
            f"the model returned a {type(output).__name__} without any tensor; pass `select=`, a function of what it "
            "returns that gives the logits"
        )
    return found


def is_integer(module: nn.Module) -> bool:
    """Whether a module computes with packed integers, as `torch.ao`'s quantized layers and exported graphs do."""
    for part in module.modules():
        if type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            return True
        graph = getattr(part, "graph", None)
        if graph is not None and any(_quantizes(str(getattr(node, "target", ""))) for node in graph.nodes):
            return True
    return False


def _quantizes(target: str) -> bool:
    return "quantize" in target and "fake_quantize" not in target


def _name(model: Any) -> str:
    return type(model).__name__ if not callable(getattr(model, "__name__", None)) else str(model.__name__)


def _weight(model: Any) -> Tensor | None:
    """A float tensor, which shows where a model lives and in which precision; None if there is none."""
    if not isinstance(model, nn.Module):
        return None
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)
