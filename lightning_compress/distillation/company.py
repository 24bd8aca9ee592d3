"""Networks that make the user's step in company, so that they learn from each other.

`PeerSource` runs whole networks (`peers`), `branching.BranchSource` branches on one trunk. Both are sources of the step
pipeline with two terms: what each network has to learn from the others, and the user's own loss of each. In a step
where the first has weight 0 no other network is run, and none trains.

Each pass draws the same random numbers: augmentation inside ``training_step`` must not show each network something
else. The student's own pass, and all that follows it, draws what it would draw alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.distillation.cohort import TASKS, CompanyTerm, Tasks, network_spec
from lightning_compress.distillation.losses import BATCH, LOGITS
from lightning_compress.distillation.peers import hidden, reset_metrics, standing_in
from lightning_compress.distillation.source import follow
from lightning_compress.distillation.taps import Call, TapSet, logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.manual import ManualBackward, Nodes
from lightning_compress.nested import tensors_in
from lightning_compress.targets import get_submodule_clean, unwrap
from lightning_compress.terms import LossTerm, Records, TapSpec


class CompanySource:
    """What both kinds of company share; a `TermSource`.

    Args:
        name: The callback's.
        root: The user's module.
        student: Clean name of the network whose outputs are compared.
        term: The term that owns the others.
        quiet: Keeps the user's module from logging while another network makes the step.
    """

    scheduled = ()

    def __init__(
        self, name: str, root: nn.Module, student: str, term: CompanyTerm,
        quiet: Callable[[], AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        self.name, self.root, self.student, self.term, self.quiet = name, root, student, term, quiet
        self.terms: list[LossTerm] = [term, Tasks(term)]
        self.manual = ManualBackward()
        self.child = f"_lc_{name}_{term.name}"
        self.taps = TapSet(get_submodule_clean(root, student, keep_wrappers=True), [""])
        self.batch: Any = None
        self._tasks: list[Tensor] = []
        self._out_of_sight: ExitStack | None = None
        self._checked = False
        self.took_part = False
        """Whether a loss came of another network yet."""

    def resolve(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of the source itself follows a schedule."""

    def task_weight_at(self, step: int) -> float:
        """The user's own loss counts as always."""
        return 1.0

    @property
    def helper(self) -> Any:
        """The other networks, looked up anew: strategies replace children."""
        return unwrap(cast(nn.Module, self.root._modules[self.child]))

    def watch(self) -> None:
        """The other networks are in the module now: put taps on them."""

    def see(self, batch: Any) -> None:
        """Take note of what ``training_step`` is given; None when it is over."""
        self.batch = batch

    def start(self, terms: Sequence[LossTerm]) -> None:
        """The student's own pass begins: nobody is to find the others in the module."""
        self._out_of_sight = ExitStack()
        self._out_of_sight.enter_context(hidden(self.root, {self.child}))
        self.taps.start()

    def stop(self) -> None:
        """Record no more; the others are in the module again."""
        self.taps.stop()
        if self._out_of_sight is not None:
            self._out_of_sight.close()
            self._out_of_sight = None

    def clear(self) -> None:
        """Forget everything of this step."""
        self.taps.clear()
        self._tasks = []

    @contextmanager
    def only(self, behind: Nodes) -> Iterator[None]:
        """Other networks need automatic optimization, so no loss is ever singled out."""
        yield

    def check_fired(self, terms: Sequence[LossTerm]) -> None:
        """Refuse a step that does not call the student.

        Raises:
            CompressionError: It names the student.
        """
        if not self.taps.fired():
            raise CompressionError(
                f"{self.name}: `training_step` did not call {self.student or type(self.root).__name__!r}, whose "
                "outputs are compared between the networks. Name the part that it calls (student=), and call it as "
                "`self.net(x)`, not `self.net.forward(x)`"
            )

    def follow(self, swaps: Any, journal: Any) -> None:
        """Move the tap when an edit replaced the student."""
        follow(self.taps, journal)

    def close(self) -> None:
        """Take all hooks off."""
        self.stop()
        self.clear()
        self.taps.remove()

    def teaching_calls(self, taps: TapSet | None = None) -> list[Call]:
        """Calls of this step through which a gradient flows: of the student, or of another network by its taps."""
        taps = taps or self.taps
        taps.values(TapSpec())  # refuses what was overwritten since
        return [call for call in taps.taps[""].calls() if logits_of(call.output).requires_grad]

    def note_task(self, output: Any) -> bool:
        """Keep the loss that a pass returned; says whether there was one."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor):
            self._tasks.append(loss)
        return isinstance(loss, Tensor)

    def records(self, terms: Sequence[LossTerm], answers: Mapping[TapSpec, list[Any]]) -> Mapping[str, Any]:
        """Records by term; ``answers`` are those of the other networks."""
        mine = [call.output for call in self.teaching_calls()]
        if not mine or not answers:
            return {}
        self.took_part = True
        student = {LOGITS: mine, BATCH: [self.batch]}
        found: dict[str, Any] = {self.term.name: (student, answers)}
        if self._tasks:
            found["tasks"] = ({}, {TASKS: list(self._tasks)})
        return {term.name: found[term.name] for term in terms if term.name in found}

    def taps_of(self, number: int) -> TapSet:
        """The taps on a network; the student is number 0."""
        return self.taps

    def as_network(self, number: int) -> AbstractContextManager[None]:
        """The user's module computes as that network inside the block; 1 is the first besides the student."""
        raise NotImplementedError

    def collect(self, terms: Sequence[LossTerm]) -> Mapping[str, tuple[Records, Records]]:
        """What all networks answered, and their losses."""
        raise NotImplementedError

    def check_calls(self, number: int, own: Sequence[Any], other: Sequence[Any]) -> None:
        """Refuse networks that were not called equally often."""
        if len(own) != len(other):
            raise CompressionError(
                f"{self.name}: in one step the student was called {len(own)} times and network {number} {len(other)} "
                "times, so their answers cannot be compared. Is `training_step` random, or does it call a network "
                "that it holds elsewhere than in an attribute?"
            )


class PeerSource(CompanySource):
    """Whole networks: each makes the user's step before the student does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seen: list[list[Call]] = []
        self._others: list[TapSet] = []

    def watch(self) -> None:
        """Put taps on the networks, before anything was run or compiled."""
        if self.student:  # else the module itself is called, by each network
            self._others = [TapSet(network.part(self.student), [""]) for network in self.helper]

    def accompany(self, step: Callable[[], Any]) -> None:
        """Let each network make the step."""
        self._seen, self._tasks = [], []
        for number, network in enumerate(self.helper, 1):
            taps = self.taps_of(number)
            with isolated_rng(), self.quiet(), self.as_network(number), taps.recording():
                output = step()
            told = self.note_task(output)
            # Without a loss (the user skipped the batch) it takes no part in this step.
            self._seen.append(self.teaching_calls(taps) if told else [])
            taps.clear()
            reset_metrics(network)

    @contextmanager
    def as_network(self, number: int) -> Iterator[None]:
        """The user's module is that network inside the block."""
        with standing_in(self.root, unwrap(self.helper[number - 1])):
            yield

    def taps_of(self, number: int) -> TapSet:
        """The taps on a network; the module's own where it is the module that is called."""
        return self._others[number - 1] if self._others and number else self.taps

    def collect(self, terms: Sequence[LossTerm]) -> Mapping[str, tuple[Records, Records]]:
        """What all networks answered."""
        own = self.teaching_calls()
        answers = {}
        for number, calls in enumerate(self._seen, 1):
            if calls and own:
                self.check_calls(number, own, calls)
                answers[network_spec(number)] = [call.output for call in calls]
        if own and not self._checked:
            self._checked = True
            self._warn_of_other_inputs(own)
        return self.records(terms, answers)

    def clear(self) -> None:
        """Forget everything of this step."""
        super().clear()
        self._seen = []

    def _warn_of_other_inputs(self, own: Sequence[Call]) -> None:
        mine = [t for call in own for t in tensors_in((call.args, call.kwargs))]
        for calls in self._seen:
            other = [t for call in calls for t in tensors_in((call.args, call.kwargs))]
            if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(mine, other, strict=False)):
                warnings.warn(
                    f"{self.name}: in `training_step` the networks were not asked the same (adversarial examples, or "
                    "random numbers of a generator of its own?); they learn each other's answers to other inputs",
                    stacklevel=2,
                )
                return

    def close(self) -> None:
        """Take all hooks off."""
        super().close()
        for taps in self._others:
            taps.remove()
