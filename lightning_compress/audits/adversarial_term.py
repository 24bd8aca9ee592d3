"""Adversarial training as a loss term: what an audit of robustness finds missing is trained for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.audits.attacks import noise
from lightning_compress.audits.attacks.projected import pgd
from lightning_compress.audits.handles import InputSpace, logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import LossTerm, Records, TapSpec, TapSpecs

_OUTPUTS, _ARGUMENTS, _BATCH = TapSpec(), TapSpec("", "arguments"), TapSpec("", "batch")
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_GOLDEN = -7046029254386353131


def content_seeds(x: Tensor, step: int) -> Tensor:
    """One seed for each example, made of its own bits and the step: the same in any batch and in any process.

    Args:
        x: Inputs (N, ...).
        step: Optimizer step; another one gives other seeds.

    Returns:
        int64 (N,).

    Example:
        >>> x = torch.rand(4, 3)
        >>> bool((content_seeds(x, 1)[2:] == content_seeds(x[2:], 1)).all())
        True
    """
    rows = x.detach().flatten(1).contiguous()
    bits = rows.view(_INTEGERS[rows.element_size()]).long()
    odd = 2 * torch.arange(bits.shape[1], device=x.device) + 1
    return noise.derive((bits * (odd * _GOLDEN)).sum(1), "training", step)  # integers wrap, in any order alike


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Passes inside leave no trace: batch statistics, observers and dropout are off; nothing is drawn or counted.

    Recurrent layers keep their mode, since cuDNN refuses to differentiate them in the other one.

    Args:
        module: The model.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with quiet(net):
        ...     _ = net(torch.rand(4, 2))
        >>> net.training, int(net.num_batches_tracked)
        (True, 0)
    """
    changed = [part for part in module.modules() if part.training and not isinstance(part, nn.RNNBase)]
    for part in changed:
        part.training = False
    try:
        yield
    finally:
        for part in changed:
            part.training = True


class AdversarialTerm(LossTerm):
    """The loss at inputs that were changed, within a ball, to raise it.

    Without `targets` it is the divergence between the answers to an input and to the changed one (TRADES, Zhang et al.
    2019, arXiv 1901.08573), which needs no labels; with them, cross entropy at the changed inputs (Madry et al. 2018,
    arXiv 1706.06083). One step from a random point, of 1.25 eps, is the fast variant of Wong et al. 2020 (arXiv
    2001.03994).

    Both the attack and the pass whose loss is trained run with the statistics that batch normalization has (`quiet`):
    inputs that do not occur do not get into its averages, as they would in plain adversarial training. Random starts
    depend on an example's values and the step alone, and draw nothing from the generators of the training.

    Args:
        eps: Radius, in raw units.
        space: Range of raw inputs, and the normalisation of what the model is given.
        norm: ``"linf"`` or ``"l2"``.
        steps: Of PGD.
        targets: Where labels (N,) are in a batch: an index or a key.
        weight: >= 0.
        name: In logs.

    Raises:
        ValueError: If `eps` or `steps` is not positive.

    Example:
        >>> AdversarialTerm(8 / 255, InputSpace(0.0, 1.0), steps=1).weight_at(0)
        1.0
    """

    def __init__(
        self,
        eps: float,
        space: InputSpace,
        norm: str = "linf",
        steps: int = 5,
        targets: int | str | None = None,
        weight: float | Scheduled = 1.0,
        name: str = "adversarial",
    ) -> None:
        if not eps > 0 or isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"eps is positive and steps a whole number, at least 1; got eps={eps!r}, steps={steps!r}")
        if norm not in ("linf", "l2"):
            raise ValueError(f"norm is 'linf' or 'l2'; got {norm!r}")
        super().__init__(weight, name)
        self.eps, self.space, self.norm, self.steps, self.targets = float(eps), space, norm, steps, targets
        self.student: nn.Module | None = None
        """The model that is attacked; set before the first step."""

    def taps(self) -> TapSpecs:
        """The student's arguments and answers, and the batch if labels are in it."""
        own = (_OUTPUTS, _ARGUMENTS)
        return TapSpecs(student=own if self.targets is None else (*own, _BATCH))

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Attack each call's input and return the mean loss there."""
        losses = [
            self._loss(_only_input(arguments), logits_of(output), student, step)
            for output, arguments in zip(student[_OUTPUTS], student[_ARGUMENTS], strict=True)
        ]
        return torch.stack(losses).mean()

    def _loss(self, x: Tensor, clean: Tensor, student: Records, step: int) -> Tensor:
        assert self.student is not None
        if clean.dim() != 2:
            raise CompressionError(
                f"{self.name!r} attacks classifiers, whose logits are (B, C); the model returns {tuple(clean.shape)}"
            )
        y = clean.detach().argmax(1) if self.targets is None else self._labels(student[_BATCH][0], clean)
        with quiet(self.student):
            answers = logits_of(self.student(self._attack(x.detach(), y, step)))
        answers = answers if answers.dtype == torch.float64 else answers.float()
        if self.targets is not None:
            return F.cross_entropy(answers, y)
        wanted = clean.to(answers.dtype).log_softmax(1)
        return F.kl_div(answers.log_softmax(1), wanted, reduction="batchmean", log_target=True)

    def _attack(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        module, space = self.student, self.space
        assert module is not None

        def logits(raw: Tensor) -> Tensor:
            return logits_of(module(space.normalize(raw)))

        found = pgd(
            logits, space.denormalize(x), y, eps=self.eps, norm=self.norm, space=space, steps=self.steps,
            seeds=content_seeds(x, step), alpha=1.25 * self.eps if self.steps == 1 else None, loss="ce", keep="last",
        )  # fmt: skip
        return space.normalize(found)

    def _labels(self, batch: Any, clean: Tensor) -> Tensor:
        try:
            found = batch[self.targets]
        except (KeyError, IndexError, TypeError) as error:
            raise CompressionError(
                f"{self.name!r} finds no labels at {self.targets!r} of a batch of type {type(batch).__name__} "
                f"({type(error).__name__}: {error}); leave targets= out to train against the model's own answers"
            ) from error
        if not isinstance(found, Tensor) or found.shape != clean.shape[:1] or found.is_floating_point():
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CompressionError(
                f"{self.name!r}: labels at {self.targets!r} of the batch are {what}, and class numbers of shape "
                f"{tuple(clean.shape[:1])} are needed; leave targets= out to train against the model's own answers"
            )
        return found


def _only_input(arguments: Any) -> Tensor:
    args, kwargs = arguments
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor) or not given[0].is_floating_point():
        kinds = [type(value).__name__ for value in given]
        raise CompressionError(
            f"adversarial training changes the one float tensor that the model is given; this model is given {kinds}. "
            "Name the part of it that takes a float tensor and returns logits (student='...')"
        )
    return given[0]
