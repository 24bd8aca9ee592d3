"""What it means to be right, for each kind of task: per-example outcomes that audits compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in

TaskName = Literal["classification", "regression", "segmentation", "token_classification", "causal_lm"]


class Flat(NamedTuple):
    """Every single decision of a batch: what calibration looks at.

    Attributes:
        probabilities: (M, C).
        labels: (M,).
        example: The example each decision belongs to, (M,).
    """

    probabilities: Tensor
    labels: Tensor
    example: Tensor


class Task:
    """How the answers of a model are judged. Every method gives one number an example, (N,), in float64.

    Attributes:
        name: Of the task.
        primary: Name of the metric that `correct` averages to.
        binary: Whether `correct` is 0 or 1.
    """

    name: ClassVar[str] = ""
    primary: ClassVar[str] = "accuracy"
    binary: ClassVar[bool] = True

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Inputs and targets of a batch: the first two of a tuple, or all of a dict but `labels`."""
        if isinstance(batch, Mapping):
            targets = next((key for key in ("labels", "label", "targets", "target") if key in batch), None)
            if targets is None:
                raise CompressionError(
                    f"a batch has the entries {sorted(map(str, batch))} and none of them is called `labels`; pass "
                    "`prepare=`, a function of a batch that returns (inputs, targets)"
                )
            inputs = {key: value for key, value in batch.items() if key != targets and isinstance(value, Tensor)}
            return inputs, batch[targets]
        if isinstance(batch, tuple | list) and len(batch) >= 2:
            return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
        raise CompressionError(
            f"a batch is a {type(batch).__name__} without targets; an audit needs (inputs, targets). Pass `prepare=`, "
            "a function of a batch that returns both"
        )

    def check(self, logits: Tensor, targets: Tensor) -> None:
        """Refuse targets that cannot belong to these answers."""
        raise NotImplementedError

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """How right each answer is, in [0, 1]."""
        raise NotImplementedError

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What training minimises."""
        raise NotImplementedError

    def margin(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A smooth number that is positive where the answer is right, with a gradient that never saturates."""
        raise NotImplementedError

    def changed(self, first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
        """Share of an example's decisions in which two models differ."""
        raise NotImplementedError

    def divergence(self, first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
        """How far the second model's answer is from the first's, at least 0."""
        raise NotImplementedError

    def by_class(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        """Share of right decisions per class, (N, C); NaN where an example has none. None without classes."""
        flat = self.flat(logits, targets)
        if flat is None:
            return None
        right = (flat.probabilities.argmax(1) == flat.labels).double()
        cell = flat.example * flat.probabilities.shape[1] + flat.labels
        zeros = torch.zeros(len(targets) * flat.probabilities.shape[1], dtype=torch.double, device=cell.device)
        count = zeros.index_add(0, cell, torch.ones_like(right))
        return (zeros.index_add(0, cell, right) / count).view(len(targets), -1)

    def flat(self, logits: Tensor, targets: Tensor) -> Flat | None:
        """All decisions with their probabilities; None if there are no probabilities."""
        return None


class Classification(Task):
    """One of C classes: logits (N, C), labels (N,).

    Example:
        >>> task = Classification()
        >>> task.correct(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])).tolist()
        [1.0, 0.0]
    """

    name = "classification"

    def check(self, logits: Tensor, targets: Tensor) -> None:
        if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.is_floating_point():
            raise CompressionError(
                f"classification needs logits (N, C) and whole labels (N,); got {tuple(logits.shape)} and "
                f"{tuple(targets.shape)} of {targets.dtype}; say which `task=` it is"
            )
        _in_range(targets, logits.shape[1])

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.argmax(1) == targets).double()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.double(), targets, reduction="none")

    def margin(self, logits: Tensor, targets: Tensor) -> Tensor:
        return _margin(logits, targets)

    def changed(self, first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
        return (first.argmax(1) != second.argmax(1)).double()

    def divergence(self, first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
        return _kl(first, second)

    def flat(self, logits: Tensor, targets: Tensor) -> Flat | None:
        return Flat(logits.double().softmax(1), targets, torch.arange(len(targets), device=targets.device))


class Regression(Task):
    """Numbers: outputs and targets of the same shape (N, ...).

    Args:
        tolerance: An answer counts as right if no output is further off than this. Default: what nine in ten answers of
            the dense model keep, found by the audit.

    Example:
        >>> Regression(0.5).correct(torch.tensor([1.0, 2.0]), torch.tensor([1.2, 3.0])).tolist()
        [1.0, 0.0]
    """

    name = "regression"
    primary = "within_tolerance"

    def __init__(self, tolerance: float | None = None) -> None:
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be positive; got {tolerance}")
        self.tolerance = tolerance

    def calibrated(self, logits: Tensor, targets: Tensor) -> Regression:
        """The same task with a tolerance, taken from the dense model if none was given."""
        if self.tolerance is not None:
            return self
        return Regression(max(float(torch.quantile(self._error(logits, targets), 0.9)), 1e-12))

    def check(self, logits: Tensor, targets: Tensor) -> None:
        if logits.numel() != targets.numel() or len(logits) != len(targets):
            raise CompressionError(
                f"regression needs one output a target; got {tuple(logits.shape)} and {tuple(targets.shape)}"
            )
        if not bool(torch.isfinite(targets.double()).all()):
            raise CompressionError("targets hold values that are not finite; remove those examples before the audit")

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (self._error(logits, targets) <= self._limit()).double()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (_rows(logits) - _rows(targets)).square().mean(1)

    def margin(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._limit() - (_rows(logits) - _rows(targets)).abs().amax(1)

    def changed(self, first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
        return (self._error(first, second) > self._limit()).double()

    def divergence(self, first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
        return (_rows(first) - _rows(second)).abs().mean(1)

    def _error(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (_rows(logits) - _rows(targets)).abs().amax(1)

    def _limit(self) -> float:
        if self.tolerance is None:
            raise ValueError("Regression has no tolerance yet; pass one, or call `calibrated`")
        return self.tolerance


class _Many(Task):
    """Tasks with many decisions an example. They are averaged by example: decisions of one are not independent."""

    binary = False

    def __init__(self, ignore: int = -100) -> None:
        self.ignore = ignore

    def _logits(self, logits: Tensor) -> Tensor:
        """As (N, D, C)."""
        raise NotImplementedError

    def _labels(self, targets: Tensor) -> Tensor:
        """As (N, D)."""
        return targets.flatten(1)

    def _mean(self, values: Tensor, targets: Tensor) -> Tensor:
        kept = self._labels(targets) != self.ignore
        return torch.where(kept, values.double(), 0.0).sum(1) / kept.sum(1).clamp_min(1)

    def check(self, logits: Tensor, targets: Tensor) -> None:
        z, y = self._logits(logits), self._labels(targets)
        if z.shape[:2] != y.shape:
            shapes = f"{tuple(logits.shape)} do not fit targets {tuple(targets.shape)}"
            raise CompressionError(f"{self.name}: logits {shapes}")
        kept = y != self.ignore
        _in_range(y[kept], z.shape[2])
        if not bool(kept.any(1).all()):
            raise CompressionError(
                f"{int((~kept.any(1)).sum())} examples have no target but {self.ignore}, which is left out; drop them"
            )

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._mean(self._logits(logits).argmax(2) == self._labels(targets), targets)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        z, y = self._logits(logits).double(), self._labels(targets)
        values = F.cross_entropy(z.transpose(1, 2), y, ignore_index=self.ignore, reduction="none")
        return self._mean(values, targets)

    def margin(self, logits: Tensor, targets: Tensor) -> Tensor:
        z, y = self._logits(logits), self._labels(targets)
        safe = torch.where(y == self.ignore, 0, y)
        return self._mean(_margin(z.flatten(0, 1), safe.flatten()).view(y.shape), targets)

    def changed(self, first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
        return self._mean(self._logits(first).argmax(2) != self._logits(second).argmax(2), targets)

    def divergence(self, first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
        a, b = self._logits(first), self._logits(second)
        return self._mean(_kl(a.flatten(0, 1), b.flatten(0, 1)).view(a.shape[:2]), targets)

    def flat(self, logits: Tensor, targets: Tensor) -> Flat | None:
        z, y = self._logits(logits), self._labels(targets)
        kept = y != self.ignore
        example = torch.arange(len(y), device=y.device)[:, None].expand_as(y)
        return Flat(z[kept].double().softmax(1), y[kept], example[kept])


class Segmentation(_Many):
    """A class for each pixel: logits (N, C, H, W), labels (N, H, W); outcomes are mean IoU per image.

    Args:
        ignore: The label of pixels that do not count.
    """

    name = "segmentation"
    primary = "mean_iou"

    def __init__(self, ignore: int = 255) -> None:
        super().__init__(ignore)

    def _logits(self, logits: Tensor) -> Tensor:
        if logits.dim() < 3:
            raise CompressionError(f"segmentation needs logits (N, C, H, W); got {tuple(logits.shape)}")
        return logits.flatten(2).transpose(1, 2)

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean IoU over the classes that an image, or its prediction, has."""
        z, y = self._logits(logits), self._labels(targets)
        kept, guess = y != self.ignore, z.argmax(2)
        met, joined = [], []
        for label in range(z.shape[2]):
            mine, theirs = (guess == label) & kept, (y == label) & kept
            met.append((mine & theirs).sum(1))
            joined.append((mine | theirs).sum(1))
        both, either = torch.stack(met, 1).double(), torch.stack(joined, 1).double()
        present = either > 0
        return torch.where(present, both / either.clamp_min(1), 0.0).sum(1) / present.sum(1).clamp_min(1)


class TokenClassification(_Many):
    """A class for each token: logits (N, T, C), labels (N, T).

    Args:
        ignore: The label of tokens that do not count.
    """

    name = "token_classification"
    primary = "token_accuracy"

    def _logits(self, logits: Tensor) -> Tensor:
        if logits.dim() != 3:
            raise CompressionError(f"{self.name} needs logits (N, T, C); got {tuple(logits.shape)}")
        return logits


class CausalLM(TokenClassification):
    """The next token, teacher-forced: logits (N, T, V) of input ids (N, T), targets (N, T) not shifted.

    Args:
        ignore: The target of tokens that do not count, such as padding.
    """

    name = "causal_lm"
    primary = "next_token_accuracy"

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Of a plain tensor of ids, and of a dict without labels, the targets are the inputs."""
        if isinstance(batch, Tensor):
            return batch, batch
        if isinstance(batch, Mapping) and "labels" not in batch and "input_ids" in batch:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            targets = ids if mask is None else torch.where(mask.bool(), ids, self.ignore)
            return {key: value for key, value in batch.items() if isinstance(value, Tensor)}, targets
        if isinstance(batch, tuple | list) and len(batch) == 1:
            return batch[0], batch[0]
        return super().split(batch)

    def _logits(self, logits: Tensor) -> Tensor:
        return super()._logits(logits)[:, :-1]

    def _labels(self, targets: Tensor) -> Tensor:
        return targets.flatten(1)[:, 1:]


_TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, Regression, Segmentation, TokenClassification, CausalLM)
}


def resolve(task: TaskName | Task | None, logits: Tensor, targets: Any) -> Task:
    """The task that was named, or the one that answers and targets look like.

    Args:
        task: A name, an adapter, or None to guess. Language modelling is never guessed.
        logits: Some answers of the dense model.
        targets: The targets of them.

    Raises:
        CompressionError: It cannot be guessed.
        ValueError: There is no such task.

    Example:
        >>> resolve(None, torch.zeros(2, 3), torch.tensor([0, 2])).name
        'classification'
    """
    if isinstance(task, Task):
        return task
    if task is not None:
        if task not in _TASKS:
            raise ValueError(f"expected a Task or one of {sorted(_TASKS)}; got {task!r}")
        return _TASKS[task]()
    y = next(tensors_in(targets))
    if y.is_floating_point():
        return Regression()
    if y.dim() == 1 and logits.dim() == 2:
        return Classification()
    if y.dim() == logits.dim() - 1 and logits.shape[2:] == y.shape[1:]:
        return Segmentation()
    if y.dim() == 2 and logits.dim() == 3 and logits.shape[:2] == y.shape:
        return TokenClassification()
    raise CompressionError(
        f"answers of shape {tuple(logits.shape)} and targets of shape {tuple(y.shape)} and {y.dtype} look like no "
        f"known task; pass `task=` as one of {sorted(_TASKS)}, or a Task of your own"
    )


def _rows(values: Tensor) -> Tensor:
    return values.double().reshape(len(values), -1)


def _in_range(labels: Tensor, classes: int) -> None:
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise CompressionError(
            f"labels lie in [{int(labels.min())}, {int(labels.max())}] and the models have {classes} classes; check "
            "that data and models belong together"
        )


def _margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Logit of the label minus the largest other one."""
    if logits.shape[1] == 1:
        return logits[:, 0].double()
    own = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], float("-inf"))
    return (own - others.amax(1)).double()


def _kl(first: Tensor, second: Tensor) -> Tensor:
    p, q = first.double().log_softmax(1), second.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1).clamp_min(0)
