"""How attacks ask a model: in pieces that fit into memory, counted, and the same for an example in any batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lightning_compress.audits.handles import rows_at_once
from lightning_compress.errors import CompressionError

Logits = Callable[..., Tensor]


class Oracle:
    """A model as attacks see it.

    Matrix products of 7 rows and of 64 take other paths and differ in the last bit, which the sign of a gradient makes
    large. So each call has a multiple of `align` rows, filled up with copies of the first: with 8, results were equal
    to the bit for any batch size on CPUs. Where they are not, as with kernels chosen by size, make `align` equal to
    `batch_size`: all calls then have one shape. Inputs so large that `align` rows do not fit into memory have the same
    smaller number in every call.

    Args:
        logits: Raw inputs (N, ...) -> outputs (N, ...). With an attribute ``by_rows = True`` it is called with
            ``rows=`` too, the places (N,) of the examples in the whole set, for what belongs to an example besides x.
        batch_size: Most rows in one call; fewer of large inputs (`handles.rows_at_once`).
        align: Each call has a multiple of this many rows.

    Attributes:
        rows: Forward passes so far, of single examples, copies not counted.
        gradient_rows: How many of them had a backward pass.

    Example:
        >>> oracle = Oracle(lambda x: x * 2)
        >>> oracle(torch.ones(3, 1)).sum().item(), oracle.rows
        (6.0, 3)
    """

    def __init__(self, logits: Logits, batch_size: int = 64, align: int = 8) -> None:
        if batch_size < 1 or align < 1:
            raise CompressionError(f"batch_size={batch_size} and align={align} have to be at least 1.")
        self.logits, self.batch_size, self.align = logits, batch_size, align
        self.rows, self.gradient_rows = 0, 0

    @staticmethod
    def of(logits: Logits | Oracle) -> Oracle:
        """The oracle itself, or one with the usual sizes."""
        return logits if isinstance(logits, Oracle) else Oracle(logits)

    def __call__(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Outputs of inputs (N, ...), without gradients.

        Args:
            x: Raw inputs.
            index: Their places in the whole set, only for callables that ask for rows.
        """
        with outside_of_modes(), torch.no_grad():
            parts = [self._call(piece, where)[: len(piece)] for piece, where in self._pieces(x, index)]
        return torch.cat(parts)

    def gradient(
        self, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs, and the gradient of each example's loss by its input.

        Args:
            x: Raw inputs (N, ...).
            y: Targets (N, ...).
            loss: Outputs, targets -> (N,).
            index: As of a call.

        Returns:
            Outputs, detached, and gradients in the shape of `x`, zero where they are not finite.

        Raises:
            CompressionError: If no gradient reaches the input.
        """
        outputs, gradients, begin = [], [], 0
        with outside_of_modes(), torch.enable_grad():
            for piece, where in self._pieces(x, index):
                leaf = piece.detach().clone().requires_grad_()
                z = self._call(leaf, where)[: len(piece)]
                found = None
                if z.requires_grad:
                    total = loss(z, y[begin : begin + len(piece)].clone()).sum()  # inference tensors cannot be kept
                    found = torch.autograd.grad(total, leaf, allow_unused=True)[0]
                if found is None:
                    raise CompressionError(
                        "The model gives no gradient with respect to its input, as integer models do. A gradient "
                        "attack would leave the input as it is and report a robust model. Attack it through a handle "
                        "with a differentiable twin (straight-through), or with Square, which needs no gradient."
                    )
                outputs.append(z.detach())
                gradients.append(torch.nan_to_num(found, 0.0, 0.0, 0.0))  # inf * 0 inside the model: no direction
                begin += len(piece)
        self.gradient_rows += len(x)
        return torch.cat(outputs), torch.cat(gradients)

    def _pieces(self, x: Tensor, index: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        if len(x) == 0:
            raise CompressionError("There are no examples to look at.")
        align = self._align(x)
        size = rows_at_once(x, self.batch_size)
        size -= size % align if size > align else 0  # filling up makes no call larger
        wheres: Any = None if index is None else torch.split(index, size)
        return [(piece, None if wheres is None else wheres[i]) for i, piece in enumerate(torch.split(x, size))]

    def _align(self, x: Tensor) -> int:
        return rows_at_once(x, self.align)

    def _call(self, x: Tensor, where: Tensor | None) -> Tensor:
        missing = -len(x) % self._align(x)
        padded = torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x
        if getattr(self.logits, "by_rows", False):
            if where is None:
                raise CompressionError("This model has to know which examples it sees, and was not told.")
            rows = torch.cat([where, where[:1].expand(missing)]) if missing else where
            z = self.logits(padded, rows=rows)
        else:
            z = self.logits(padded)
        self.rows += len(x)
        if not isinstance(z, Tensor) or len(z) != len(padded):
            shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise CompressionError(f"{len(padded)} inputs gave outputs of {shape}: one row for each input is needed.")
        if not bool(torch.isfinite(z.detach()).all()):
            raise CompressionError(
                "The model's output has NaN or infinite values, so that no prediction can be judged. In half "
                "precision, audit a copy in float32."
            )
        return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def outside_of_modes() -> ExitStack:
    """A context without the caller's inference mode and autocast: both break or blur gradients without a word."""
    undo = ExitStack()
    undo.enter_context(torch.inference_mode(False))
    for device in ("cpu", "cuda"):
        if device == "cpu" or torch.cuda.is_available():
            undo.enter_context(torch.autocast(device, enabled=False))
    return undo
