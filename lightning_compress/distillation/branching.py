"""Branches that make the user's step in company: see `branches` for how, `company` for what is shared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lightning_compress.distillation import ensembles
from lightning_compress.distillation.branches import Branch, Gate, Trunk, in_place, metrics_of
from lightning_compress.distillation.cohort import GATED, network_spec
from lightning_compress.distillation.company import CompanySource
from lightning_compress.distillation.peers import hidden, reset_metrics
from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng, note_rng
from lightning_compress.targets import unwrap
from lightning_compress.terms import LossTerm, Records, TapSpec


class BranchSource(CompanySource):
    """Branches: after the student's pass each makes the step again, on what the trunk has computed."""

    def __init__(self, *args: Any, heads: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heads = tuple(heads)
        self.trunk = Trunk(self.taps.root, self.heads)
        self._step: Callable[[], Any] | None = None
        self._restore: Callable[[], None] | None = None

    @property
    def branches(self) -> list[Branch]:
        """The branches besides the student's own."""
        return [cast(Branch, unwrap(branch)) for branch in self.helper.branches]

    def accompany(self, step: Callable[[], Any]) -> None:
        """Note how to make the step again, with the same random numbers."""
        self._step, self._restore = step, note_rng()

    def start(self, terms: Sequence[LossTerm]) -> None:
        """Record the student's pass, and its trunk."""
        super().start(terms)
        self.trunk.start()

    def stop(self) -> None:
        """Record no more."""
        self.trunk.stop()
        super().stop()

    def clear(self) -> None:
        """Forget everything of this step."""
        super().clear()
        self.trunk.clear()
        self._step = self._restore = None

    @contextmanager
    def as_network(self, number: int) -> Iterator[None]:
        """The user's module has that branch's heads inside the block."""
        branch = self.branches[number - 1]
        own = dict(zip(self.heads, branch, strict=False))
        metrics = dict(zip(branch.metrics, list(branch)[len(self.heads) :], strict=True))
        with in_place(self.taps.root, own), in_place(self.root, metrics), hidden(self.root, {self.child}):
            yield

    def collect(self, terms: Sequence[LossTerm]) -> Mapping[str, tuple[Records, Records]]:
        """Make the step with each branch, and with their gated ensemble."""
        own = self.teaching_calls()
        if not own:
            return {}
        everything = self.taps.taps[""].calls()
        features = [
            f for f, call in zip(self.trunk.features, everything, strict=False) if logits_of(call.output).requires_grad
        ]
        answers: dict[TapSpec, list[Any]] = {}
        for number, branch in enumerate(self.branches, 1):
            with self.as_network(number), in_place(self.taps.root, self.trunk.replays()):
                output, outputs = self._again()
            if self.note_task(output):
                self.check_calls(number, own, outputs)
                answers[network_spec(number)] = outputs
            reset_metrics(branch)
        gate = self.helper.gate
        if gate is not None and answers:
            gates = [cast(Gate, gate)(feature) for feature in features]
            answers[GATED] = self._ensemble(gates, [call.output for call in own], answers)
        return self.records(terms, answers)

    def _again(self) -> tuple[Any, list[Any]]:
        """The user's step once more, as the random numbers were; what it returned, and what the student did."""
        assert self._step is not None
        assert self._restore is not None
        kept = self.taps.taps[""]._recorder.calls
        mine, kept[:] = list(kept), []
        try:
            with isolated_rng(), self.quiet():
                self._restore()
                self.taps.start()
                try:
                    output = self._step()
                finally:
                    self.taps.stop()
            return output, [call.output for call in self.teaching_calls()]
        finally:
            kept[:] = mine

    def _ensemble(self, gates: Sequence[Tensor], own: Sequence[Any], answers: Mapping[TapSpec, list[Any]]) -> list[Any]:
        """The gated answers; the user's loss of them trains the gate."""
        made = []
        for index, output in enumerate(own):
            call = [logits_of(output), *(logits_of(z[index]) for z in answers.values())]
            made.append(
                _with_logits(self.name, output, ensembles.gated_logits(call, gates[index], self.term.class_dim))
            )
        metrics = {name: copy.deepcopy(metric) for name, metric in metrics_of(self.root).items()}
        with answering(self.root, self.student, made), in_place(self.root, metrics), hidden(self.root, {self.child}):
            output, _ = self._again()
        self.note_task(output)
        return made

    def close(self) -> None:
        """Take all hooks off."""
        super().close()
        self.trunk.close()


class Answers(nn.Module):
    """Answers with given values, one for each call."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__()
        self.values, self.asked = list(values), 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The next value."""
        self.asked += 1
        return self.values[self.asked - 1]


@contextmanager
def answering(root: nn.Module, student: str, values: Sequence[Any]) -> Iterator[None]:
    """Let the student answer with given values inside the block."""
    stub = Answers(values)
    if student:
        with in_place(root, {student: stub}):
            yield
        return
    before = root.__dict__.get("forward")
    root.__dict__["forward"] = stub.forward
    try:
        yield
    finally:
        del root.__dict__["forward"]
        if before is not None:
            root.__dict__["forward"] = before


def _with_logits(owner: str, output: Any, logits: Tensor) -> Any:
    """What the student returned, with other logits in it."""
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, tuple | list):
        return type(output)([logits, *output[1:]])
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None:
        raise CompressionError(
            f"{owner}: the network computes its loss itself, so the ensemble's loss, which trains the gate, cannot be "
            "had. Compute it in `training_step` from the logits, or take ensemble='mean'"
        )
    changed = copy.copy(output)
    if isinstance(changed, Mapping):
        changed["logits"] = logits  # type: ignore[index]
    else:
        changed.logits = logits
    return changed


class Branches(nn.Module):
    """The helper module of branches: the branches and, if there is one, the gate."""

    def __init__(self, branches: Sequence[Branch], gate: Gate | None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.gate = gate

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those that train while the branches do."""
        own = [p for branch in self.branches for p in cast(Branch, unwrap(branch)).trained_parameters()]
        return own + ([] if self.gate is None else list(self.gate.parameters()))

    def shard_units(self) -> list[nn.Module]:
        """What FSDP2 shards."""
        own = [unit for branch in self.branches for unit in cast(Branch, unwrap(branch)).shard_units()]
        return own + ([] if self.gate is None else [self.gate])
