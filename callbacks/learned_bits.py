"""Learned bit widths: each layer finds in training how many bits its weights need, within one budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_compress import manifest
from lightning_compress.callbacks import examples
from lightning_compress.callbacks.base import FAKE_QUANT, CompressionCallback
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.cost import count_macs
from lightning_compress.errors import CompressionError
from lightning_compress.probe import from_example_inputs
from lightning_compress.quantization import attachment
from lightning_compress.quantization.attachment import SEARCH
from lightning_compress.quantization.bits import choices
from lightning_compress.quantization.bits.bit_search import Searched, choose_edit, search_edit, searched
from lightning_compress.quantization.bits.learned_bits import BarrierPenalty
from lightning_compress.quantization.spec import parse
from lightning_compress.schedule import Schedule
from lightning_compress.targets import as_patterns, select

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

_FLOAT = "float/float"


class LearnedBitWidths(CompressionCallback):
    """Learns how many bits the weights of each layer get, within a budget for all (after BP-NAS, Yu et al., ECCV 2020).

    From `schedule` on each weight is the mean of its candidates, with probabilities that are trained along with the
    model; a barrier on their expected cost keeps them within the budget. At `until` every layer takes its most probable
    candidate, or the most probable choice that fits if that does not, and trains on with it alone. The choice is a
    recorded decision. Activations stay as they are: give them to `QuantizationAwareTraining(weights="none")` beside
    this callback. See `lightning_compress.quantization.bits.allocation` for choosing bits without training.

    Args:
        candidates: What each weight may become, two or more: ``"int8"`` down to ``"int2"``, ``"binary"``,
            ``"alternating2"``, ...; nothing with steps of its own to learn.
        keep_bytes: The budget as a share of the bytes that the layers have now, in (0, 1).
        keep_bops: Or as a share of their bit operations (multiply-accumulates times bits of the weight), in (0, 1).
        schedule: Its ``begin`` is the step from which on the weights are mixtures.
        until: When the choice is made.
        barrier: Factor of the barrier, >= 0.
        one_hot: Factor of the term that makes probabilities decided, >= 0.
        temperature: Of the softmax over the candidates, > 0; lower makes their probabilities move faster.
        targets: Name patterns or types of the layers.
        exclude: Name patterns or types to leave out.
        example_inputs: Arguments of one call, to count operations for `keep_bops`; default: from the data.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range or not understood.

    Example:
        >>> from lightning_compress import Schedule
        >>> from lightning_compress.callbacks import LearnedBitWidths
        >>> bits = LearnedBitWidths(("int8", "int4", "int2"), keep_bytes=0.15, schedule=Schedule(begin=0), until="60%")
        >>> bits.budget
        ('bytes', 0.15)
    """

    order = FAKE_QUANT

    def __init__(
        self,
        candidates: Sequence[str] = ("int8", "int4", "int2"),
        keep_bytes: float | None = None,
        keep_bops: float | None = None,
        schedule: Schedule = Schedule(begin="10%"),  # noqa: B008 - frozen
        until: int | float | str = "60%",
        barrier: float = 0.03,
        one_hot: float = 0.0,
        temperature: float = 1.0,
        targets: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        example_inputs: Any = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule says when the search begins, such as Schedule(begin='10%'); got {schedule!r}")
        super().__init__(name, replace(schedule, end=None, curve="constant"))
        if isinstance(candidates, str) or len(set(candidates)) < 2:
            raise ValueError(f"candidates are two or more, such as ('int8', 'int4'); got {candidates!r}")
        self.candidates = {choice: parse(choice, "weights") for choice in candidates}
        if None in self.candidates.values():
            raise ValueError(f"'none' is no candidate: leave such layers out with exclude=; got {candidates!r}")
        search_edit([], self.candidates, temperature)  # type: ignore[arg-type]
        self.budget = _budget(keep_bytes, keep_bops)
        Schedule(begin=until)
        for what, value in {"barrier": barrier, "one_hot": one_hot}.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{what} is at least 0; got {value!r}")
        if not temperature > 0:
            raise ValueError(f"temperature is positive; got {temperature!r}")
        self.until, self.barrier, self.one_hot, self.temperature = until, barrier, one_hot, temperature
        as_patterns("targets", targets)
        as_patterns("exclude", exclude)
        self.targets, self.exclude = targets, exclude
        if example_inputs is not None:
            from_example_inputs(example_inputs)
        self.example_inputs = example_inputs

    # ------------------------------------------------------------------------------------------------------ life
    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self._penalty: BarrierPenalty | None = None
        self._end = 0

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        run.adapter.require("learned bit widths", self.name)

    def at_setup(self, run: Coordinator) -> None:
        """Put the mixtures on, unless a checkpoint or an earlier fit has brought them or the choice along."""
        own = [e for e in manifest.edits_of(run.pl_module) if e.get("by") == self.name]
        if any(e["kind"] == SEARCH for e in own):
            return
        found = select(run.pl_module, self.targets, self.exclude, kinds=attachment.KINDS)
        names = [name for name, module in found.items() if attachment.slots_for(module).weights]
        run.edit(self.name, [{**search_edit(names, self.candidates, self.temperature), "by": self.name}])  # type: ignore[arg-type]

    def start(self, run: Coordinator) -> None:
        """Work out when the choice is made."""
        assert self.resolved is not None
        self._end = run.resolve(Schedule(begin=self.until, curve="constant")).events[0]
        if self._end <= self.resolved.events[0] and not run.is_trial:
            raise CompressionError(
                f"{self.name}: the search would begin at step {self.resolved.events[0]} and end at step {self._end}; "
                "let it end later (until=) or begin earlier (schedule=)"
            )
        held = {id(p) for o in run.trainer.optimizers for group in o.param_groups for p in group["params"]}
        for layer, found in searched(run.pl_module).items():
            if id(found.bits.logits) not in held:
                raise CompressionError(
                    f"{self.name}: no optimizer has the learned bits of {layer!r}, so nothing would be learned; build "
                    f"optimizers from self.parameters(), or leave out what is not trained (exclude=({layer!r},))"
                )

    def event(self, run: Coordinator, step: int) -> None:
        """Let the mixtures compute from now on."""
        mixtures = searched(run.pl_module)
        off = {layer: list(found.slots) for layer, found in mixtures.items() if not found.bits.enabled}
        if off:
            run.edit(self.name, [attachment.enable_edit(off)])

    def boundary(self, run: Coordinator, step: int) -> None:
        """Refuse a budget that cannot be kept in the first step; pull while it searches, and choose when it is time."""
        if self._penalty is None and (mixtures := searched(run.pl_module)):
            self._penalty = self._make_penalty(run, mixtures)
        if self._penalty is None or not self.done:
            return
        if step >= self._end:
            self._choose(run, step)
        elif self._penalty not in run.pipeline.gradient_terms:
            run.pipeline.add_gradient_term(self._penalty)

    def finish(self, run: Coordinator) -> None:
        """Say so if nothing was chosen."""
        if searched(run.pl_module):
            rank_zero_info(
                f"{self.name}: the fit ended before step {self._end}, so no bits were chosen; the weights are still "
                "mixtures, and a fit that goes on from here will choose"
            )

    # ---------------------------------------------------------------------------------------------------- search
    def _make_penalty(self, run: Coordinator, mixtures: Mapping[str, Searched]) -> BarrierPenalty:
        costs = self._costs(run, list(mixtures))
        budget = self.budget[1] * math.fsum(of[_FLOAT] for of in costs.values())
        pairs = {layer: (found.bits, None) for layer, found in mixtures.items()}
        slots = {layer: found.slots[0] for layer, found in mixtures.items()}
        factors = {"barrier": self.barrier, "one_hot": self.one_hot}
        penalty = BarrierPenalty(pairs, costs, budget, **factors, slots=slots, transform=attachment.TRANSFORM)
        penalty.name = self.name
        penalty.resolve(run.total_steps, run.steps_per_epoch, run.is_trial)
        return penalty

    def _costs(self, run: Coordinator, layers: list[str]) -> dict[str, dict[str, float]]:
        """What each layer costs with each candidate, and in full precision."""
        options = choices.choices([*self.candidates, None])
        if self.budget[0] == "bytes":
            return choices.byte_costs(run.pl_module, layers, options)
        call = examples.example_call(run, self.example_inputs, layers, self.name)
        return choices.bop_costs(count_macs(run.pl_module, call).per_module, layers, options)

    def _choose(self, run: Coordinator, step: int) -> None:
        penalty = self._penalty
        assert penalty is not None
        with run.timed() as seconds:
            found = run.adapter.decide(lambda: penalty.harden().choices)
            chosen = {layer: name.split("/")[0] for layer, name in found.items()}
            run.decisions.record(step, f"{self.name}/bits", chosen)
            edit = {**choose_edit(chosen), "by": self.name}
            run.edit(self.name, [edit])
            if penalty in run.pipeline.gradient_terms:
                run.pipeline.gradient_terms.remove(penalty)
            self._penalty = None
            record = self._record(run, step, penalty, chosen, seconds())
        run.emit(record)

    def _record(
        self, run: Coordinator, step: int, penalty: BarrierPenalty, chosen: Mapping[str, str], seconds: float
    ) -> EventRecord:
        costs, key = penalty.costs, f"keep_{self.budget[0]}"
        whole = math.fsum(of[_FLOAT] for of in costs.values())
        cost = math.fsum(costs[layer][f"{choice}/float"] for layer, choice in chosen.items())
        changes: list[dict[str, Any]] = [
            {"name": layer, "before": 32, "after": self.candidates[choice].bits}  # type: ignore[union-attr]
            for layer, choice in chosen.items()
        ]
        return EventRecord(
            step=step, epoch=run.trainer.current_epoch, technique="LearnedBitWidths", name=self.name,
            asked={key: self.budget[1]}, reached={key: cost / whole}, layers=changes, seconds=seconds,
        )  # fmt: skip


def _budget(keep_bytes: float | None, keep_bops: float | None) -> tuple[str, float]:
    given = [(k, v) for k, v in (("bytes", keep_bytes), ("bops", keep_bops)) if v is not None]
    if len(given) != 1:
        raise ValueError(f"give one budget: keep_bytes or keep_bops; got {keep_bytes!r} and {keep_bops!r}")
    kind, share = given[0]
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"keep_{kind} is a share, such as 0.15; got {share!r}")
    if not 0 < share < 1:
        raise ValueError(f"keep_{kind} is a share in (0, 1); got {share!r}")
    return kind, float(share)
