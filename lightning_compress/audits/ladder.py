"""All attacks on one model, weakest doubt last: each works on what the ones before it left standing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_compress.audits.attacks import goals, noise
from lightning_compress.audits.attacks.auto_pgd import apgd, apgd_targeted
from lightning_compress.audits.attacks.goals import Goal
from lightning_compress.audits.attacks.oracle import Oracle
from lightning_compress.audits.attacks.projected import pgd
from lightning_compress.audits.attacks.square_search import square
from lightning_compress.audits.attacks.threat import ball
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.tasks import Task
from lightning_compress.errors import CompressionError

MODELS = ("dense", "compressed")


@dataclass(frozen=True)
class Threat:
    """What the attacker may do, and for how long.

    Args:
        eps: Radius, in raw units, or in those of `scale`.
        norm: ``"linf"`` or ``"l2"``.
        space: Bounds of inputs, and which entries may change.
        scale: Unit of each entry; `None`: raw.
        steps: Of each gradient attack.
        queries: Of Square.
        restarts: Random starts of the gradient attacks.
        targets: Classes that targeted APGD aims at; 0: not used.
        batch_size: Most rows in one call of the model.
        align: Rows of a call are a multiple of this.
    """

    eps: float
    norm: str
    space: InputSpace
    scale: Tensor | None = None
    steps: int = 30
    queries: int = 300
    restarts: int = 1
    targets: int = 0
    batch_size: int = 64
    align: int = 8


@dataclass
class Rungs:
    """What the attacks did to N examples of one model.

    Args:
        clean: How right it is without an attack, in [0, 1] (N,).
        outcome: How right it is at the worst point found (N,).
        points: That point (N, ...).
        after: Name of an attack -> outcome after it and all before it (N,).
        alone: Name of an attack that ran on all examples -> its own outcome (N,).
        inside: Whether each worst point is inside the ball, looked at again from the outside (N,).
        rows: Forward passes of single examples.
        source: Points of a gradient attack that went as far beyond the boundary as it could, for transfer (N, ...);
            `None` where there was no gradient.
    """

    clean: Tensor
    outcome: Tensor
    points: Tensor
    after: dict[str, Tensor] = field(default_factory=dict)
    alone: dict[str, Tensor] = field(default_factory=dict)
    inside: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: int = 0
    source: Tensor | None = None


class Ladder:
    """The attacks on one model, scored on what ships.

    Args:
        handle: The model.
        task: Says what is right.
        x: Raw inputs (N, ...).
        y: Targets (N, ...).
        seeds: int64 (N,), one for each example; the same for every model, so that outcomes are paired.
        threat: What the attacker may do.
    """

    def __init__(self, handle: ModelHandle, task: Task, x: Tensor, y: Tensor, seeds: Tensor, threat: Threat) -> None:
        self.handle, self.task, self.y, self.seeds, self.threat = handle, task, y, seeds, threat
        self.ball = ball(x, threat.eps, threat.norm, threat.space, threat.scale)
        self.soft = oracle_of(handle, threat)
        self.hard = Oracle(handle.predict, threat.batch_size, threat.align)
        clean = self._score(self.ball.x)
        self.found = Rungs(clean, clean.clone(), self.ball.x.clone())
        self._square: Tensor | None = None  # points of Square for what gradients left standing, if they are known

    def gradient(self) -> None:
        """APGD on logits of a scale that does not matter and on the difference of logits ratio."""
        z = self.hard(self.ball.x[:1])
        for name, loss in _losses(self.task, z):
            self._attack(name, lambda x, y, seeds, loss=loss: self._apgd(x, y, seeds, loss))
        if self.threat.targets and self.task.name == "classification" and goals.logits_of(z).shape[1] > 2:
            self._attack("apgd-targeted", self._targeted)

    def far(self) -> Tensor:
        """Points far beyond the boundary of what gradients are taken of, to try on other models (N, ...)."""
        loss = _losses(self.task, self.hard(self.ball.x[:1]))[0][1]
        self.found.source = pgd(
            self.soft, self.ball.x, self.y, seeds=noise.derive(self.seeds, "far"), steps=min(20, self.threat.steps),
            loss=loss, stop=False, **self._common(),
        )  # fmt: skip
        self.offer("pgd", self.found.source)
        return self.found.source

    def black_box(self) -> None:
        """Square: no gradient, so nothing that hides gradients fools it."""
        if self.ball.x.dim() > 4:
            return
        if self._square is None:
            self._attack("square", self._squares)
            return
        index = (self.found.outcome > 0).nonzero().squeeze(1)
        if len(index):
            self._keep(index, self._square[index], self._score(self._square[index], index))
        self.found.after["square"] = self.found.outcome.clone()

    def alone(self, gradient: bool) -> dict[str, Tensor]:
        """What attacks find that need no other model, as tensors that `recall` takes.

        Square runs on all that gradients leave standing. Points of other models leave fewer, and an example's result
        does not depend on the others, so that what it finds here is what `black_box` would find later.

        Args:
            gradient: Whether the model has one.
        """
        if gradient:
            self.gradient()
            self.far()
        found = self.found
        state = {"outcome": found.outcome, "points": found.points}
        state |= {} if found.source is None else {"source": found.source}
        for i, (name, left) in enumerate(found.after.items()):  # in order, which files do not keep
            state[f"after/{i:03d}/{name}"] = left
        state |= {f"alone/{name}": own for name, own in found.alone.items()}
        if self.ball.x.dim() <= 4:
            index = (found.outcome > 0).nonzero().squeeze(1)
            state["square"] = self.ball.x.clone()
            if len(index):
                seeds = noise.derive(self.seeds[index], "square")
                state["square"][index] = self._squares(self.ball.x[index], self.y[index], seeds)
        return {**state, "rows": torch.tensor([self.soft.rows, self.hard.rows])}

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `alone` found, here or in an earlier audit."""
        home = self.ball.x.device
        state = {name: tensor.to(home) for name, tensor in state.items()}
        self.found.outcome, self.found.points = state["outcome"].clone(), state["points"].clone()
        self.found.source, self._square = state.get("source"), state.get("square")
        after = sorted(name for name in state if name.startswith("after/"))
        self.found.after = {name.split("/", 2)[2]: state[name] for name in after}
        self.found.alone = {name[len("alone/") :]: state[name] for name in state if name.startswith("alone/")}
        self.soft.rows, self.hard.rows = map(int, state["rows"].tolist())

    def _squares(self, x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
        loss, queries = goal_of(self.task), self.threat.queries
        return square(self.hard, x, y, seeds=seeds, queries=queries, loss=loss, **self._common())

    def offer(self, name: str, points: Tensor) -> None:
        """Try points that were found elsewhere, such as on another model, on all examples."""
        outcome = torch.where(self.ball.contains(points), self._score(points), self.found.clean)
        self.found.alone[name] = outcome
        self._keep(torch.arange(len(points), device=points.device), points, outcome)
        self.found.after[name] = self.found.outcome.clone()

    def finish(self, original: Tensor) -> Rungs:
        """What was found, with the budget looked at again against the inputs that the user gave."""
        threat = self.threat
        around = ball(original, threat.eps, threat.norm, threat.space, threat.scale)
        self.found.inside = around.contains(self.found.points)
        again = self._score(self.found.points)
        self.found.inside &= again == self.found.outcome
        self.found.rows = self.soft.rows + self.hard.rows
        return self.found

    def _attack(self, name: str, run: object) -> None:
        """Run an attack on what still stands."""
        assert callable(run)
        index = (self.found.outcome > 0).nonzero().squeeze(1)
        if len(index):
            points = run(self.ball.x[index], self.y[index], noise.derive(self.seeds[index], name))
            self._keep(index, points, self._score(points, index))
        self.found.after[name] = self.found.outcome.clone()

    def _keep(self, index: Tensor, points: Tensor, outcome: Tensor) -> None:
        worse = outcome < self.found.outcome[index]
        self.found.outcome[index[worse]], self.found.points[index[worse]] = outcome[worse], points[worse]

    def _score(self, points: Tensor, index: Tensor | None = None) -> Tensor:
        """How right what ships is, at points of some of the examples."""
        y = self.y if index is None else self.y[index]
        return self.task.correct(answers(self.hard(points), self.task), y)

    def _common(self) -> dict[str, Any]:
        threat = self.threat
        return {"eps": threat.eps, "norm": threat.norm, "space": threat.space, "scale": threat.scale}

    def _apgd(self, x: Tensor, y: Tensor, seeds: Tensor, loss: str | Goal) -> Tensor:
        threat = self.threat
        return apgd(
            self.soft, x, y, eps=threat.eps, norm=threat.norm, space=threat.space, scale=threat.scale, seeds=seeds,
            steps=threat.steps, restarts=threat.restarts, loss=loss,
        )  # fmt: skip

    def _targeted(self, x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
        threat = self.threat
        return apgd_targeted(
            self.soft, x, y, eps=threat.eps, norm=threat.norm, space=threat.space, scale=threat.scale, seeds=seeds,
            steps=threat.steps, targets=threat.targets,
        )  # fmt: skip


def oracle_of(handle: ModelHandle, threat: Threat) -> Oracle:
    """A handle for attacks: with a gradient where one is asked for, and else what ships alone."""

    def logits(x: Tensor) -> Tensor:
        return handle.differentiable(x) if torch.is_grad_enabled() and x.requires_grad else handle.predict(x)

    return Oracle(logits, threat.batch_size, threat.align)


def answers(z: Tensor, task: Task) -> Tensor:
    """Outputs as the task expects them: a single logit of a binary classifier gets a second one."""
    return goals.logits_of(z) if task.name == "classification" and z.dim() <= 2 else z


def goal_of(task: Task) -> str | Goal:
    """What attacks without gradients climb."""
    return "margin" if task.name == "classification" else _general(task)


def goal_for_tokens(task: Task) -> str | Goal:
    """What attacks with gradients climb first."""
    return "scaled_ce" if task.name == "classification" else _general(task)


def _losses(task: Task, z: Tensor) -> list[tuple[str, str | Goal]]:
    if task.name != "classification":
        return [("apgd", _general(task))]
    ratio = ("apgd-dlr", "dlr") if goals.logits_of(z).shape[1] >= 3 else ("apgd-margin", "margin")
    return [("apgd-ce", "scaled_ce"), ratio]


def _general(task: Task) -> Goal:
    """Of any task: regression climbs out of its tolerance, many decisions fall one by one."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return -task.margin(z, y) if task.name == "regression" else task.loss(z, y)

    def value(z: Tensor, y: Tensor) -> Tensor:
        rest = loss(z, y)
        return 1e-3 * rest / (1 + rest.abs()) - task.correct(z, y)  # the loss decides between equal outcomes

    return Goal(task.name, loss, value, lambda z, y: task.correct(z, y) <= 0)


def default_threat(x: Tensor, space: InputSpace, norm: str, eps: float | None, **settings: object) -> Threat:
    """A threat whose radius fits the inputs.

    Without a radius: 8/255 of the range for images and 5 % of each column's range for other inputs (linf); for l2 half
    of the range for as many entries as a CIFAR image has, growing with the root of their number.

    Args:
        x: Raw inputs.
        space: Bounds of inputs.
        norm: ``"linf"`` or ``"l2"``.
        eps: Radius in raw units; `None`: as above.
        **settings: The rest of the threat.

    Raises:
        CompressionError: If there is no radius and the bounds are not finite.

    Example:
        >>> round(255 * default_threat(torch.zeros(1, 3, 8, 8), InputSpace(0.0, 1.0), "linf", None).eps)
        8
    """
    given: Mapping[str, object] = settings
    if eps is not None:
        return Threat(eps, norm, space, **given)  # type: ignore[arg-type]
    low, high = space.bounds(x)
    width = high - low
    if not bool(torch.isfinite(width).all()):
        raise CompressionError("Without finite bounds there is no usual radius; pass eps= in the units of the inputs.")
    share = (8 / 255 if x.dim() == 4 else 0.05) if norm == "linf" else 0.5 * (x[0].numel() / 3072) ** 0.5
    scale = None if float(width.max()) == float(width.min()) else width.expand_as(x[:1])
    return Threat(share if scale is not None else share * float(width.max()), norm, space, scale, **given)  # type: ignore[arg-type]
