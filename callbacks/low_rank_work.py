"""What `LowRank` does at one moment: look at the model, plan on rank 0, and carry it out on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress import manifest
from lightning_compress.callbacks import examples, interplay
from lightning_compress.callbacks.events import EventRecord, restarts
from lightning_compress.callbacks.low_rank_inputs import covariances
from lightning_compress.callbacks.pruning import Pruning
from lightning_compress.cost import count_parameters
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank import costs, latency, masking, ranks
from lightning_compress.low_rank.compaction import compaction_edits
from lightning_compress.low_rank.costs import Observation
from lightning_compress.low_rank.factorization import Ranks
from lightning_compress.low_rank.planning import Context, Plan, check_reachable, make_plan
from lightning_compress.low_rank.replacement import REPLACE, given, replace_edit
from lightning_compress.low_rank.units import Unit, factored_parts, find_units, unit_of, weight_of
from lightning_compress.probe import ExampleCall
from lightning_compress.replacing import kept_because

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.callbacks.low_rank import LowRank


class Work:
    """One moment of a `LowRank` callback.

    Args:
        owner: The callback.
        run: The coordinator.
    """

    def __init__(self, owner: LowRank, run: Coordinator) -> None:
        self.owner, self.run, self.root = owner, run, run.pl_module

    # ------------------------------------------------------------------------------------------------- replacing
    def replace(self, step: int, reason: str | None = None) -> None:
        """Put factors in the place of layers."""
        run, owner = self.run, self.owner
        with run.timed() as seconds:
            call = self._example([unit.layer for unit in self._dense_units(None)[0]])
            seen = run.adapter.decide(lambda: self._observe(call))
            units, kept = self._dense_units(seen)
            seen_inputs, notes = covariances(owner, run, units)
            plan = run.adapter.decide(lambda: self._plan(step, units, kept, call, seen, seen_inputs, None))
            self._record_table(step, plan)
            first, transaction = not run.is_changed, None
            if plan.chosen:
                with given(self.root, plan.factors, owner.optimizer_state):
                    transaction = run.edit(owner.name, [{**replace_edit(plan.layers), "by": owner.name}])
            if reason is not None:
                run.decisions.record(step, f"{owner.name}/switch", reason)
            notes += [] if plan.chosen else ["no layer was factored: the model is as dense as it was"]
            notes += kept_because(plan.kept) + ([] if transaction is None else restarts(transaction.notes))
            notes += self._reset_monitors(first) if plan.chosen else []
            record = self._record(step, plan, notes, seconds())
        run.emit(record)

    def rehearse(self, step: int) -> None:
        """Find out in the first step, not in the middle of the training, that a budget cannot be met."""
        run, owner = self.run, self.owner
        present = self.masked_units() if owner.mode == "masked" else {}
        call = self._example([unit.layer for unit in present or self._dense_units(None)[0]])
        if call is None and owner.settings.budget != "parameters":
            return
        if owner.mode == "masked":
            seen = None if call is None else run.adapter.in_step(lambda: self._observe_everywhere(call))
            context = Context(self.root, self._weight, call, seen, present=present, parameters=self._size())
            run.adapter.decide(lambda: check_reachable(list(present), {}, owner.settings, context))
            return
        table, ratios = run.adapter.decide(lambda: self._check_budget(call))
        if table is not None:  # measured once: a resumed fit must not measure again and decide otherwise
            run.decisions.record(step, f"{owner.name}/latency", table)
        if ratios:
            run.decisions.record(step, f"{owner.name}/rehearsed", dict(ratios))

    def _check_budget(self, call: ExampleCall | None) -> tuple[Mapping[str, Any] | None, Mapping[str, float]]:
        seen = self._observe(call)
        units, kept = self._dense_units(seen)
        table = self._table(units, call, seen)
        context = Context(self.root, self._weight, call, seen, table=table)
        return table, check_reachable(units, kept, self.owner.settings, context)

    def _weight(self, unit: Unit) -> Tensor:
        return weight_of(self.root, unit)

    def _dense_units(self, seen: Observation | None) -> tuple[list[Unit], dict[str, str]]:
        owner = self.owner
        ran = None if seen is None else seen.order
        units, kept = find_units(self.root, owner.targets, owner.exclude, owner.method, owner.keep_first_last, ran)
        masked = self.run.masking.store.local
        if masked and not any(isinstance(technique, Pruning) for technique in self.run.techniques):
            for unit in units:
                if _names_of(unit) & masked.keys():
                    kept[unit.layer] = "its weights are masked, and there is no Pruning to mask its factors anew"
        return [unit for unit in units if unit.layer not in kept], kept

    def _example(self, layers: Sequence[str]) -> ExampleCall | None:
        """An example call; ``None`` where none can be had and none is needed."""
        run, owner = self.run, self.owner
        given_ = owner.example_inputs is not None or self.root.example_input_array is not None
        rehearsable = run.batch is not None and self.root.automatic_optimization
        needed = owner.settings.budget in ("macs", "latency") or owner.settings.probe
        if not layers or not (given_ or rehearsable or needed):
            return None
        every, kept = find_units(self.root, keep_first_last=False)  # all of them: which is first and which last?
        wanted = [list(dict.fromkeys([*(unit.layer for unit in every), *kept, *layers])), list(layers)]
        while True:
            covered = wanted.pop(0)
            try:
                call = run.adapter.in_step(
                    lambda names=covered: examples.example_call(  # type: ignore[misc]
                        run, owner.example_inputs, names, owner.name
                    )
                )
            except CompressionError:  # on every rank together
                if not wanted and needed:
                    raise
                if not wanted:
                    return None
            else:
                return call.to(next(self.root.parameters()).device)

    def _observe(self, call: ExampleCall | None) -> Observation | None:
        if call is None:
            return None
        owner = self.owner
        timed = owner.settings.probe or owner.settings.budget == "latency"
        units, kept = find_units(self.root, keep_first_last=False)  # all of them: which is first and last?
        return costs.observe(self.root, call, {*(unit.layer for unit in units), *kept}, keep_arguments=timed)

    def _plan(
        self, step: int, units: Sequence[Unit], kept: Mapping[str, str], call: ExampleCall | None,
        seen: Observation | None, covariances: Mapping[str, Tensor], whole: Mapping[str, Tensor] | None,
        present: Mapping[Unit, Ranks] | None = None, parameters: int | None = None,
    ) -> Plan:  # fmt: skip
        context = Context(
            self.root, lambda unit: weight_of(self.root, unit, whole), call, seen, covariances, self._initial(),
            self._table(units, call, seen), present or {}, parameters,
        )  # fmt: skip
        plan = make_plan(units, kept, self.owner.settings, context)
        plan.table = context.table
        return plan

    def _initial(self) -> dict[str, list[float]]:
        found = self.run.decisions.find(f"{self.owner.name}/initial")
        return {} if found is None else found.outcome

    def _table(
        self, units: Sequence[Unit], call: ExampleCall | None, seen: Observation | None
    ) -> Mapping[str, Any] | None:
        if self.owner.settings.budget != "latency" or call is None or seen is None:
            return None
        known = self.run.decisions.find(f"{self.owner.name}/latency")
        if known is not None and latency.is_current(known.outcome, units):
            return known.outcome  # type: ignore[no-any-return]
        return latency.measure_table(self.root, call, units, seen)

    def _record_table(self, step: int, plan: Plan) -> None:
        """Keep what was measured: a resumed fit must not measure again and decide otherwise."""
        known = self.run.decisions.find(f"{self.owner.name}/latency")
        if plan.table is not None and (known is None or known.outcome != plan.table):
            self.run.decisions.record(step, f"{self.owner.name}/latency", plan.table)
        if plan.ratios:
            self.run.decisions.record(step, f"{self.owner.name}/probe", dict(plan.ratios))

    # -------------------------------------------------------------------------------------------------- masking
    def begin_masked(self) -> None:
        """Put factors of full rank in the place of layers that a lower rank could make cheaper."""
        run, owner = self.run, self.owner
        if any(parameter.is_meta for parameter in self.root.parameters()):
            raise CompressionError(
                f"{owner.name}: the model is on the meta device, so it has no values to factor; build it on a real "
                "device before `fit`"
            )
        units, kept = self._dense_units(None)
        low = {unit: tuple(min(owner.settings.multiple_of, full) for full in unit.full) for unit in units}
        pays = [unit for unit in units if costs.why_not_worth(unit, low[unit], owner.settings.min_gain) is None]
        kept |= {unit.name: "no rank would pay" for unit in units if unit not in pays}
        plan = run.adapter.decide(lambda: self._full(pays, kept))
        if plan.chosen:
            with given(self.root, plan.factors, owner.optimizer_state):
                run.edit(owner.name, [{**replace_edit(plan.layers), "by": owner.name}])
        for line in kept_because(plan.kept):
            rank_zero_info(f"{owner.name}: {line}")

    def _full(self, units: Sequence[Unit], kept: Mapping[str, str]) -> Plan:
        plan = Plan(kept=dict(kept))
        for unit in units:
            weight = weight_of(self.root, unit).cpu()
            try:
                factors = unit.algebra.factorize(weight, unit.full, unit.groups)
            except CompressionError as error:
                plan.kept[unit.name] = str(error)
                continue
            plan.chosen[unit] = unit.full
            plan.factors.setdefault(unit.layer, {})[unit.part] = factors
        return plan

    def masked_units(self) -> dict[Unit, Ranks]:
        """The factors that this callback put in place, with their ranks of now."""
        mine = {
            name for edit in manifest.edits_of(self.root)
            if edit.get("kind") == REPLACE and edit.get("by") == self.owner.name for name in edit["layers"]
        }  # fmt: skip
        found = {}
        for layer, parts in factored_parts(self.root).items():
            for part, (prefix, module) in parts.items() if layer in mine else ():
                unit = unit_of(layer, part, module)
                found[unit] = _ranks_of(unit, prefix, module)
        return found

    def mask(self, step: int, reason: str) -> None:
        """Zero the directions that the ranks leave out; shapes stay."""
        run, owner = self.run, self.owner
        with run.timed() as seconds:
            present = self.masked_units()
            self._refuse_masks(present)
            call = self._example([unit.layer for unit in present])
            seen_inputs, notes = covariances(owner, run, list(present))
            seen = None if call is None else run.adapter.in_step(lambda: self._observe_everywhere(call))
            whole, size = self._whole(present), self._size()
            plan = run.adapter.decide(
                lambda: self._plan(step, list(present), {}, call, seen, seen_inputs, whole, present, size)
            )
            chosen = {unit: plan.factors[unit.layer][unit.part] for unit in plan.chosen}
            run.adapter.agree({u.name: list(r) for u, r in plan.chosen.items()}, f"the ranks of {owner.name}")
            self._zero(chosen, whole)
            run.decisions.record(step, f"{owner.name}/ranks", {u.name: list(r) for u, r in plan.chosen.items()})
            run.decisions.record(step, f"{owner.name}/switch", reason)
            others = [e for e in manifest.edits_of(self.root) if e.get("by") != owner.name]
            first = not any(manifest.changes_outputs(e) for e in others) and not len(run.masking)
            notes += [] if chosen else ["no rank was lowered: the model is as large as it was"]
            notes += kept_because(plan.kept) + (self._reset_monitors(first) if chosen else [])
            record = self._record(step, plan, notes, seconds())
        run.emit(record)

    def _zero(self, chosen: Mapping[Unit, Sequence[Tensor]], whole: Mapping[str, Tensor]) -> None:
        """Write factors of lower rank, here and in averages, or leave everything as it was."""
        values = masking.new_weights(self.root, chosen, whole)
        try:
            self._write(values)
            for average in interplay.averages(self.run.trainer):
                masking.refit(average, chosen)
        except BaseException:
            self._write({name: whole[name] for name in values})
            raise
        parameters = self.run.adapter.parameters(self.root)
        for optimizer in self.run.trainer.optimizers:  # their sums belong to other directions now
            for name in values:
                optimizer.state.pop(parameters[name], None)

    def _observe_everywhere(self, call: ExampleCall) -> Observation:
        return costs.observe(self.root, call, {unit.layer for unit in self.masked_units()})

    def _refuse_masks(self, present: Mapping[Unit, Ranks]) -> None:
        prefixes = tuple(f"{unit.name}." for unit in present)
        masked = [name for name in self.run.masking.store.local if name.startswith(prefixes)]
        if masked:
            raise CompressionError(
                f"{self.owner.name}: {masked[0]!r} is masked already, and choosing its rank would mix masked and kept "
                "weights; let Pruning begin after the switch, or use mode='replace'"
            )

    def _whole(self, units: Mapping[Unit, Ranks]) -> dict[str, Tensor]:
        """The small weights, whole, on every rank."""
        prefixes = {prefix for unit in units for prefix, _ in (factored_parts(self.root)[unit.layer][unit.part],)}
        with self.run.adapter.summoned(self.root) as named:
            names = [n for n in self._parameter_names() if n.rpartition(".")[0].rpartition(".")[0] in prefixes]
            return {name: named[name].detach().cpu().clone() for name in names if name.endswith(".weight")}

    def _size(self) -> int:
        """Parameters of the whole model, on every rank."""
        if self.run.adapter.kind != "fsdp1":
            return count_parameters(self.root)
        with self.run.adapter.summoned(self.root) as named:
            return sum(named[name].numel() for name in self._parameter_names())

    def _parameter_names(self) -> list[str]:
        return list(self.run.adapter.parameters(self.root))

    def _write(self, values: Mapping[str, Tensor]) -> None:
        run = self.run
        parameters = run.adapter.parameters(self.root)
        with torch.no_grad():
            if run.adapter.kind == "fsdp1":
                with run.adapter.summoned(self.root, writeback=True) as whole:
                    for name, value in values.items():
                        whole[name].copy_(value)
            else:
                for name, value in values.items():
                    run.adapter.write(parameters[name], value)

    def end_masked(self) -> None:
        """Cut zero directions away, and make those dense again whose rank stayed too high to pay."""
        run, owner = self.run, self.owner
        if run.adapter.is_sharded:
            rank_zero_info(
                f"{owner.name}: shapes are fixed under this strategy; load the checkpoint and make it small with "
                "lightning_compress.low_rank.compaction.compact(model)"
            )
            return
        edits = run.adapter.decide(lambda: compaction_edits(self.root))
        if edits:
            run.edit(owner.name, [{**edit, "by": owner.name} for edit in edits])

    # ------------------------------------------------------------------------------------------------ measuring
    def scales(self) -> dict[str, list[float]]:
        """Full by stable rank of each unit now."""
        return self._measured(ranks.stable_scale)

    def estimates(self) -> dict[str, float]:
        """The scaled stable rank of each unit now, not rounded; of several ranks their sum."""
        initial = self._initial()

        def estimate(unit: Unit, weight: Tensor) -> float:
            now = ranks.stable_scale(unit, weight)
            scale = initial.get(unit.name, now)
            return float(sum(full * s / max(n, 1e-9) for full, s, n in zip(unit.full, scale, now, strict=True)))

        return self._measured(estimate)

    def _measured(self, measure: Any) -> dict[str, Any]:
        masked = self.owner.mode == "masked"
        units = list(self.masked_units()) if masked else self._dense_units(None)[0]
        whole = self._whole(self.masked_units()) if masked else None

        def all_units() -> dict[str, Any]:
            found = {}
            for unit in units:
                try:
                    found[unit.name] = measure(unit, weight_of(self.root, unit, whole).cpu())
                except CompressionError:  # not finite: such a layer stays dense, and the plan says why
                    continue
            return found

        return self.run.adapter.decide(all_units)

    # ------------------------------------------------------------------------------------------------ reporting
    def _reset_monitors(self, first: bool) -> list[str]:
        if not self.owner.reset_monitors or self.owner.resolved is None:
            return []
        kept = interplay.reset_monitors(self.run.trainer, first)
        return [f"the best file before the switch stays: {path}" for path in kept]

    def _record(self, step: int, plan: Plan, notes: list[str], seconds: float) -> EventRecord:
        rows = [
            {"name": unit.name, "before": " x ".join(map(str, unit.full)), "after": " x ".join(map(str, found))}
            if len(found) > 1 else {"name": unit.name, "before": unit.full[0], "after": found[0]}
            for unit, found in plan.chosen.items()
        ]  # fmt: skip
        return EventRecord(
            step=step, epoch=self.run.trainer.current_epoch, technique="LowRank", name=self.owner.name,
            asked=plan.asked, reached=plan.reached, layers=rows, notes=notes, seconds=seconds,
        )  # fmt: skip


def _ranks_of(unit: Unit, prefix: str, module: nn.Module) -> Ranks:
    """The ranks by the attributes of the small layers: parameters may be sharded."""
    small: list[Any] = list(module.children())
    if isinstance(small[0], nn.Embedding):
        return (int(small[0].embedding_dim),)
    outs = [int(getattr(layer, "out_channels", getattr(layer, "out_features", 0))) for layer in small[:-1]]
    return tuple(out // unit.groups for out in outs[: unit.algebra.ranks])


def _names_of(unit: Unit) -> set[str]:
    return {f"{unit.layer}.{name}" for name in (unit.part, "weight", "in_proj_weight", "out_proj.weight")}
