"""What stays the same while several models are explained: choice, baseline, random numbers, and their cached maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_compress.audits.attributions import INCOMPLETE, Attribution, Method, attribute
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.explained import Explained
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.remembered import fingerprint
from lightning_compress.audits.results import AuditResult


@dataclass(eq=False)
class Work:
    """The examples of one audit of explanations.

    Attributes:
        context: The models.
        x: The explained tensor (N, ...).
        others: Further tensors of the input.
        rebuild: Puts them together.
        choice: What the dense model answers.
        baseline: What stands for "nothing there" (N, ...).
        layer: Of Grad-CAM.
        steps: Of integrated gradients.
        options: `patches` and `permutations`.
        cache: Maps by model and method.
        fewer: The same for fewer examples, once somebody asked for it.
    """

    context: AuditContext
    x: Tensor
    others: tuple[Tensor, ...]
    rebuild: Callable[[Tensor, tuple[Tensor, ...]], Any]
    choice: Tensor
    baseline: Tensor
    layer: str | None
    steps: int
    options: dict[str, int]
    result: AuditResult
    cache: dict[tuple[str, Method], Attribution] = field(default_factory=dict)
    fewer: Work | None = None

    def model(self, handle: ModelHandle) -> Explained:
        """A model as a function of the explained tensor."""
        return Explained(handle, self.context.task, self.rebuild)

    def maps(self, key: str, handle: ModelHandle, method: Method) -> Attribution:
        """Maps of a model, computed once; integrated gradients with four times the steps where they are incomplete."""
        if (key, method) not in self.cache:
            self.cache[key, method] = self._made(handle, method) if key == "compressed" else self._kept(handle, method)
        return self.cache[key, method]

    def _made(self, handle: ModelHandle, method: Method) -> Attribution:
        found = self.attribute(handle, method, self.x)
        if self.incompleteness(found) > INCOMPLETE:
            found = self.attribute(handle, method, self.x, 4 * self.steps)
        return found

    def incompleteness(self, found: Attribution) -> float:
        """That of the examples of all processes: they decide alike whether more steps are needed."""
        if found.delta is None or found.change is None:
            return 0.0
        delta, change = (self.context.gather(values) for values in (found.delta, found.change))
        return replace(found, delta=delta, change=change).incompleteness

    def _kept(self, handle: ModelHandle, method: Method) -> Attribution:
        """Maps of a reference, which may be known from an earlier audit."""
        memory = self.context.remembered
        if memory is None or not isinstance(handle.deployed, nn.Module):
            return self._made(handle, method)

        def compute() -> dict[str, Tensor]:
            own = self._made(handle, method)
            parts = {"maps": own.maps, "delta": own.delta, "change": own.change}
            return {name: tensor for name, tensor in parts.items() if tensor is not None}

        found = self.context.of_dense("attributions", {**self.arguments(method), "model": fingerprint(handle)}, compute)
        return Attribution(found["maps"].to(self.x.device), method, found.get("delta"), found.get("change"))

    def arguments(self, method: Method) -> dict[str, Any]:
        """What maps depend on besides the model."""
        own = {"method": method, "steps": self.steps, "layer": self.layer, **self.options}
        return {**own, "choice": self.choice, "baseline": self.baseline}

    def attribute(self, handle: ModelHandle, method: Method, x: Tensor, steps: int | None = None) -> Attribution:
        """Maps of other inputs with the same choice and baseline."""
        count = len(x)
        return attribute(
            self.model(handle), x, self.choice[:count], tuple(other[:count] for other in self.others), method=method,
            baseline=self.baseline[:count], steps=steps or self.steps, layer=self.layer, seed=self.context.seed,
            **self.options,
        )  # fmt: skip
