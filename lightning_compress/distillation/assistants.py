"""Assistants between a teacher and a student: what may be one, which to take, and when each teaches.

Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant": a student learns better from a teacher
that is not much larger than itself, so a network of a size in between is distilled first and teaches then. Zhang et al.
2023, "MiniDisc: Minimal Distillation Schedule for Language Model Compression", choose one assistant among pruned copies
of the teacher by what it loses and what it weighs, without trying each on the student.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.targets import get_submodule_clean

_MISSING = object()


def tradeoff(metric: float, scale: float, weight: float = 0.2) -> float:
    """MiniDisc's score of a candidate: ``metric + weight * sparsity``, as in the authors' code (GeneZC/MiniDisc).

    Args:
        metric: How well the candidate does as it is, in [0, 1].
        scale: Its share of the teacher's size, in (0, 1]; its sparsity is ``1 - scale``.
        weight: What being small is worth (the paper's lambda; the authors' code takes 0.2), >= 0.

    Returns:
        The score; the largest is the best.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> tradeoff(0.75, scale=0.5, weight=0.5)
        1.0
    """
    if not 0 <= metric <= 1 or not 0 < scale <= 1 or not weight >= 0:
        raise ValueError(
            f"metric lies in [0, 1], scale in (0, 1], weight is >= 0; found metric={metric!r}, scale={scale!r}, "
            f"weight={weight!r}"
        )
    return metric + weight * (1 - scale)


def choose(metrics: Sequence[float], scales: Sequence[float], weight: float = 0.2) -> int:
    """Choose the candidate of the best `tradeoff`; of equal ones the smaller (the authors' code takes the first).

    Args:
        metrics: One for each candidate.
        scales: Their shares of the teacher's size.
        weight: See `tradeoff`.

    Raises:
        ValueError: If there is none, or an argument is out of range.

    Example:
        >>> choose([0.99, 0.97, 0.60], scales=[0.75, 0.50, 0.25], weight=0.2)
        1
    """
    if not metrics or len(metrics) != len(scales):
        raise ValueError(f"one metric and one scale for each candidate; found {len(metrics)} and {len(scales)}")
    scores = [tradeoff(m, s, weight) for m, s in zip(metrics, scales, strict=True)]
    return max(range(len(scores)), key=lambda i: (scores[i], -scales[i]))


# -- what may be one --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One model of a chain.

    Args:
        name: How messages call it.
        module: The model.
    """

    name: str
    module: nn.Module

    @property
    def size(self) -> int:
        """Its number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def check_sizes(chain: Sequence[Member]) -> None:
    """Refuse an assistant that is larger than who teaches it, or that shares parameters with another model.

    Args:
        chain: The teacher, the assistants, the student.

    Raises:
        CompressionError: With the sizes.

    Example:
        >>> check_sizes([Member("the teacher", nn.Linear(2, 9)), Member("assistant 0", nn.Linear(2, 5))])
    """
    seen: dict[int, str] = {}
    for member in chain:
        shared = next((seen[id(p)] for p in member.module.parameters() if id(p) in seen), None)
        if shared is not None:
            raise CompressionError(f"{member.name} shares parameters with {shared}; pass a copy (copy.deepcopy)")
        seen.update({id(p): member.name for p in member.module.parameters()})
    for above, below in itertools.pairwise(chain[:-1]):
        if below.size > above.size:
            sizes = ", ".join(f"{m.name} {m.size:,}" for m in chain)
            raise CompressionError(
                f"{below.name} is larger than {above.name}, which is to teach it. Parameters: {sizes}. An assistant "
                "lies between teacher and student; order them from large to small, or leave this one out"
            )


def check_answers(chain: Sequence[Member], outputs: Sequence[Any]) -> None:
    """Refuse models that answer with other shapes (another number of classes) than the student.

    Args:
        chain: The teacher, the assistants, the student.
        outputs: What each answers to the same question.

    Raises:
        CompressionError: With the shapes.

    Example:
        >>> import torch
        >>> chain = [Member("the teacher", nn.Identity()), Member("the student", nn.Identity())]
        >>> check_answers(chain, [torch.ones(2, 10), torch.ones(2, 10)])
    """
    shapes = [tuple(logits_of(output).shape) for output in outputs]
    wrong = next((i for i, shape in enumerate(shapes) if shape != shapes[-1]), None)
    if wrong is not None:
        raise CompressionError(
            f"{chain[wrong].name} answers with shape {shapes[wrong]} and {chain[-1].name} with {shapes[-1]}: in a "
            "chain each learns the answers of the one before, so all have the same classes"
        )


# -- standing in -------------------------------------------------------------------------------------------------------


class Companion(nn.Module):
    """Holds a model that is trained beside the user's, and that no file of the user's model is to hold.

    It is a child of the user's module, so it gets to the device, into DDP and into optimizers; its state dict is empty,
    and loading one leaves it as it is.

    Args:
        module: The model.

    Example:
        >>> root = nn.Module()
        >>> root.add_module("_lc_assistant", Companion(nn.Linear(2, 2)))
        >>> len(list(root.parameters())), len(root.state_dict()), root.load_state_dict({})
        (2, 0, <All keys matched successfully>)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_load_state_dict_pre_hook(_own_values)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Nothing; see `state_of` for what it holds."""
        return {} if destination is None else destination

    def state_of(self) -> dict[str, Tensor]:
        """A copy of the model's own state, on the CPU."""
        return {name: value.detach().clone().cpu() for name, value in self.module.state_dict().items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)


def _own_values(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    assert isinstance(module, Companion)
    for name, value in module.module.state_dict(keep_vars=False).items():
        state[f"{prefix}module.{name}"] = value


@contextmanager
def standing_in(root: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Let a module be called in the place of a part of the user's module.

    Args:
        root: The user's module.
        name: Clean name of the part; ``""`` is the user's module itself, whose ``forward`` is then the other's.
        module: What is called instead.

    Example:
        >>> root = nn.Sequential(nn.Linear(2, 2))
        >>> with standing_in(root, "0", nn.Identity()):
        ...     print(type(root[0]).__name__)
        Identity
        >>> print(type(root[0]).__name__)
        Linear
    """
    if not name:
        before = vars(root).get("forward", _MISSING)
        vars(root)["forward"] = functools.partial(_call, module)
        try:
            yield
        finally:
            if before is _MISSING:
                del vars(root)["forward"]
            else:
                vars(root)["forward"] = before
        return
    above, _, leaf = name.rpartition(".")
    modules: dict[str, nn.Module | None] = get_submodule_clean(root, above)._modules
    own = modules[leaf]
    modules[leaf] = module
    try:
        yield
    finally:
        modules[leaf] = own


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


# -- when --------------------------------------------------------------------------------------------------------------


def phase_boundaries(begin: int, total: int, assistants: int, student_share: float) -> tuple[int, ...]:
    """Steps at which a chain hands over: the assistants share equally what the student leaves.

    Args:
        begin: Step at which the first assistant begins.
        total: Steps of the run.
        assistants: How many, at least 1.
        student_share: Share of the steps from `begin` on that are the student's own, in (0, 1).

    Returns:
        The first step of each phase after the first.

    Raises:
        CompressionError: If there are not enough steps.

    Example:
        >>> phase_boundaries(begin=0, total=100, assistants=1, student_share=0.5)
        (50,)
        >>> phase_boundaries(begin=40, total=100, assistants=2, student_share=0.5)
        (55, 70)
    """
    left = total - begin
    for_assistants = left - round(left * student_share)
    found = tuple(begin + for_assistants * k // assistants for k in range(1, assistants + 1))
    if len({begin, *found, total}) < assistants + 2:
        raise CompressionError(
            f"{left} steps are too few for {assistants} assistants and a student with {student_share:.0%} of them; "
            "train longer, or begin earlier"
        )
    return found


def scores_table(metrics: Mapping[float, float], weight: float) -> str:
    """The candidates as text: scale, metric, score."""
    lines = [f"{'scale':>7} {'metric':>7} {'score':>7}"]
    lines += [f"{s:7.3f} {m:7.3f} {tradeoff(m, s, weight):7.3f}" for s, m in metrics.items()]
    return "\n".join(lines)
