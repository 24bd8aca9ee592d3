"""Robust accuracy of two models under the same attacks, with what says whether to believe it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_compress.audits import sanity
from lightning_compress.audits.attacks.noise import example_seeds
from lightning_compress.audits.attacks.with_autoattack import autoattack
from lightning_compress.audits.attacks.with_torchattacks import torchattacks_attack
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.embedding_robustness import EmbeddingRobustness
from lightning_compress.audits.forecast import GRADIENT
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.integrity import batch_invariance, determinism, twin_fidelity
from lightning_compress.audits.ladder import MODELS, Ladder, Rungs, Threat, default_threat
from lightning_compress.audits.remembered import from_text, to_text
from lightning_compress.audits.results import AuditResult, Check, Metric
from lightning_compress.errors import CompressionError

_NUMBERS_AT_ONCE = 20_000_000  # of inputs in one block; an attack holds about six copies
_FEW = 16


class Robustness:
    """Robust accuracy at one radius: the worst case of several attacks, example by example, on what ships.

    A model with gradients is attacked by APGD (on logits whose scale does not matter, then on the difference of logits
    ratio) and PGD. One without is attacked straight through its twin, with points of the twin and of the dense model,
    and with a longer Square. Both models get the points of the other, and Square checks that no gradient is hidden.
    What counts is the answer of the deployed model at the worst point that any of these found.

    `options={"robustness": {...}}` of an audit are arguments of this class, and so for the other ones here.

    Args:
        eps: Radius in raw units; `None`: 8/255 of the range for images, 5 % of each column for tables, and for l2 a
            radius that fits the size.
        norm: ``"linf"`` or ``"l2"``.
        steps: Of each gradient attack.
        queries: Of Square. `None`: 300; for a model without gradients of its own 500, and 1000 in an audit of tier 2.
        targets: Classes for targeted APGD, the likeliest wrong ones; 0: none. `None`: 3 in an audit of tier 2, else 0.
        restarts: Random starts.
        sanity: Make the checks that cost attacks of their own.
        thorough: Among them that twice the steps find hardly more, which takes twice as long.
        batch_size: Most rows in one call of a model; changes no result.
        foreign: Attacks of other libraries besides, each on all examples: names of torchattacks such as ``"CW"``, or
            ``"pyautoattack"``. They see all examples together, so that results may depend on which these are.

    Example:
        >>> Robustness(eps=0.1, steps=10).name
        'robustness'
    """

    name, family, tier = "robustness", "robustness", 1

    def __init__(
        self,
        eps: float | None = None,
        norm: str = "linf",
        *,
        steps: int = 30,
        queries: int | None = None,
        targets: int | None = None,
        restarts: int = 1,
        sanity: bool = True,
        thorough: bool = False,
        batch_size: int = 64,
        foreign: Sequence[str] = (),
    ) -> None:
        if isinstance(foreign, str):
            raise ValueError(f"foreign is a list of names, such as ['CW']; got {foreign!r}")
        self.foreign = tuple(foreign)
        self.eps, self.norm, self.sanity, self.thorough = eps, norm, sanity, thorough
        self.settings = {"steps": steps, "restarts": restarts, "batch_size": batch_size}
        self.queries, self.targets = queries, targets

    def asks(self, context: AuditContext) -> float:
        """Answers, see `forecast`: two runs of APGD, one of PGD, and Square, of which half the examples fall early."""
        if not isinstance(context.inputs, Tensor) or not context.inputs.is_floating_point():
            return 0.0
        gradients = 3 * int(self.settings["steps"]) * int(self.settings["restarts"])
        queries = sum(self._queries(context, getattr(context, name)) for name in MODELS)
        return len(context) * (2 * GRADIENT * gradients + queries) / 2

    def run(self, context: AuditContext) -> AuditResult:
        """Attack both models; of token models the embeddings, which is a bound and is called so."""
        started = time.perf_counter()
        if self.name in context.options:
            return type(self)(**context.options[self.name]).run(without_options(context))
        if not isinstance(context.inputs, Tensor) or not context.inputs.is_floating_point():
            return EmbeddingRobustness(batch_size=int(self.settings["batch_size"])).run(context)
        x, space = raw_inputs(context)
        seeds = example_seeds(context.ids, context.seed).to(x.device)
        targets = self.targets if self.targets is not None else 3 if context.tier > 1 else 0
        threat = default_threat(x, space, self.norm, self.eps, targets=targets, **self.settings)
        found: dict[str, list[Rungs]] = {name: [] for name in MODELS}
        spread: list[dict[tuple[str, str], Tensor]] = []
        done = 0
        for block in blocks(x, context):
            part = self._block(context, x[block], context.targets[block], seeds[block], threat)
            for name in MODELS:
                found[name].append(part[0][name])
            spread.append(part[1])
            done = block.stop
        whole = {name: _joined(found[name]) for name in MODELS}
        matrix = {pair: torch.cat([part[pair] for part in spread]) for pair in spread[0]}
        checks = {name: self._checks(context, name, x[:done], seeds[:done], threat, whole[name]) for name in MODELS}
        return self._report(context, whole, matrix, checks, threat, done, time.perf_counter() - started)

    def _threat(self, context: AuditContext, handle: ModelHandle, threat: Threat) -> Threat:
        return replace(threat, queries=self._queries(context, handle))

    def _queries(self, context: AuditContext, handle: ModelHandle) -> int:
        """Without a gradient of its own a model gets more queries: Square is then no mere check."""
        if self.queries or handle.via == "direct":
            return self.queries or 300
        return 1000 if context.tier > 1 else 500

    def _block(
        self, context: AuditContext, x: Tensor, y: Tensor, seeds: Tensor, threat: Threat
    ) -> tuple[dict[str, Rungs], dict[tuple[str, str], Tensor]]:
        """All attacks on some of the examples, and the outcome of each (source, target)."""
        handles = {name: getattr(context, name) for name in MODELS}
        ladders = {
            name: Ladder(handle, context.task, x, y, seeds, self._threat(context, handle, threat))
            for name, handle in handles.items()
        }
        sources: dict[str, Tensor] = {}
        for name, ladder in ladders.items():
            gradient = context.gradients(name).correlation is not None
            if name == "dense" and context.remembered is not None:
                arguments = {**plain_threat(ladder.threat), "gradient": gradient, "seeds": seeds}
                ladder.recall(context.of_dense("attacks", arguments, partial(ladder.alone, gradient)))
                sources |= {} if ladder.found.source is None else {name: ladder.found.source}
            elif gradient:
                ladder.gradient()
                sources[name] = ladder.far()
        twin = _twin(context.compressed)
        if twin is not None:
            sources["twin"] = Ladder(twin, context.task, x, y, seeds, threat).far()
        matrix: dict[tuple[str, str], Tensor] = {}
        for source, points in sources.items():
            for target, ladder in ladders.items():
                if source != target:
                    ladder.offer(f"transfer from {source}", points)
                matrix[source, target] = ladder.found.alone["pgd" if source == target else f"transfer from {source}"]
            if twin is not None:
                matrix[source, "twin"] = context.task.correct(twin.predict(points), y)
        for ladder in ladders.values():
            ladder.black_box()
            for name in self.foreign:
                ladder.offer(name, _foreign(name, ladder))
        return {name: ladder.finish(x) for name, ladder in ladders.items()}, matrix

    def _checks(
        self, context: AuditContext, name: str, x: Tensor, seeds: Tensor, threat: Threat, found: Rungs
    ) -> list[Check]:
        """What has to hold before the number is believed."""
        handle: ModelHandle = getattr(context, name)
        y, task, few = context.targets[: len(x)], context.task, slice(0, _FEW)
        checks = [check for check in context.gradients(name).checks() if check.check == "gradient"]
        everywhere = _gathered(context, found)
        checks += [sanity.budget(everywhere), determinism(handle, x[few]), batch_invariance(handle, x[few])]
        if handle.via != "direct":
            checks.append(twin_fidelity(handle, x, task, y))
        checks += sanity.gradients_beat_the_rest(everywhere)
        if self.sanity:
            own = self._threat(context, handle, threat)

            def alone() -> dict[str, Tensor]:
                made = [
                    check(handle, task, x, y, seeds, own) for check in (sanity.nothing_moves, sanity.everything_falls)
                ]
                return {"checks": to_text([[check.check, check.ok, check.detail] for check in made])}

            arguments = {**plain_threat(own), "examples": len(x)}
            kept = context.of_dense("attack checks", arguments, alone) if name == "dense" else alone()
            checks += [Check(*entry) for entry in from_text(kept["checks"])]
            checks.append(sanity.noise_is_weaker(handle, task, x, y, seeds, own, found))
            if self.thorough and context.gradients(name).correlation is not None:
                checks.append(sanity.more_steps(handle, task, x, y, seeds, own, found))
        return checks

    def _report(
        self,
        context: AuditContext,
        found: dict[str, Rungs],
        matrix: dict[tuple[str, str], Tensor],
        checks: dict[str, list[Check]],
        threat: Threat,
        done: int,
        seconds: float,
    ) -> AuditResult:
        handle = context.compressed
        words: dict[str, Any] = {
            "access": "white box" if handle.via == "direct" else "white box of the twin, black box of what ships",
            "norm": threat.norm, "eps": threat.eps, "unit": "raw" if threat.scale is None else "range of each entry",
            "steps": threat.steps, "queries": self._threat(context, handle, threat).queries, "via": handle.via,
            "attacks": list(found["compressed"].after),
        }  # fmt: skip
        trust = checks["compressed"] + [Check(f"dense: {c.check}", c.ok, c.detail) for c in checks["dense"]]
        common: dict[str, Any] = {"threat": words, "trust": trust, "truncated": done < len(context)}
        main = context.compare(
            "robust_accuracy", self.family, found["dense"].outcome, found["compressed"].outcome,
            note=f"worst case of {len(words['attacks'])} attacks, each example by itself", **common,
        )  # fmt: skip
        main.seconds = seconds
        metrics = [main, *self._transfers(context, found, matrix, words, trust)]
        ids = context.gather(context.ids[:done])
        per_example: dict[str, list[Any]] = {"ids": ids.tolist()}
        for name in MODELS:
            per_example[f"{name}_clean"] = context.gather(found[name].clean).tolist()
            per_example[f"{name}_robust"] = context.gather(found[name].outcome).tolist()
        tables = [_ladder_table(context, found), _matrix_table(context, matrix)]
        result = AuditResult(
            self.name, 1, {**words, **self.settings, "targets": threat.targets}, metrics, per_example, tables
        )
        result.params["forward_passes"] = {name: found[name].rows for name in MODELS}
        result.warnings += self._warnings(context, done)
        return result

    def _transfers(
        self,
        context: AuditContext,
        found: dict[str, Rungs],
        matrix: dict[tuple[str, str], Tensor],
        words: dict[str, Any],
        trust: Sequence[Check],
    ) -> list[Metric]:
        """How the compressed model stands what was found on the dense one, beside the other way round."""
        if ("dense", "compressed") not in matrix or ("compressed", "dense") not in matrix:
            return []
        threat = {**words, "access": "transfer", "attacks": ["pgd"]}
        there, back = matrix["dense", "compressed"], matrix["compressed", "dense"]
        note = "accuracy at points found on the dense model; beside it the dense model at points of the compressed one"
        failed = [check for check in trust if not check.ok and check.check in ("budget", "deterministic")]
        return [context.compare("transfer_accuracy", self.family, back, there, threat=threat, note=note, trust=failed)]

    def _warnings(self, context: AuditContext, done: int) -> list[str]:
        said = []
        if done < len(context):
            said.append(f"the budget ended after {done} of {len(context)} examples")
        for name in MODELS:
            zero = context.gradients(name).zero_rows
            if zero:
                said.append(
                    f"{name}: the cross entropy of {zero:.0%} of the examples has no gradient left; attacks here do "
                    f"not depend on the scale of logits, others would call such examples robust"
                )
        return said


def _foreign(name: str, ladder: Ladder) -> Tensor:
    """Points that an attack of another library finds."""
    threat = ladder.threat
    if threat.scale is not None:
        raise CompressionError(
            f"{name} knows one radius for all columns, and tables have one for each; leave foreign= out, or give eps="
        )
    common: dict[str, Any] = {"eps": threat.eps, "norm": threat.norm, "space": threat.space, "seeds": ladder.seeds}
    if name == "pyautoattack":
        return autoattack(ladder.soft, ladder.ball.x, ladder.y, **common)
    return torchattacks_attack(name, ladder.soft, ladder.ball.x, ladder.y, steps=threat.steps, **common)


def plain_threat(threat: Threat) -> dict[str, Any]:
    """What an attacker may do, as arguments of a memory; bounds of inputs belong to the model's handle."""
    values = {field.name: getattr(threat, field.name) for field in fields(threat)}
    space = values.pop("space")
    return {**values, "space": [space.low, space.high, space.mutable]}


def raw_inputs(context: AuditContext) -> tuple[Tensor, InputSpace]:
    """The inputs and their bounds.

    Raises:
        CompressionError: If inputs are no single tensor of numbers, or have no bounds.
    """
    x, space = context.inputs, context.compressed.space or context.dense.space
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise CompressionError(
            "Attacks move numbers a little; these inputs are tokens, whole numbers or several tensors. For token "
            "models run EmbeddingRobustness, which moves embeddings."
        )
    if space is None:
        raise CompressionError("An attack needs the bounds of raw inputs: pass InputSpace(low, high, mean=, std=).")
    space.check(x)
    return x, space


def without_options(context: AuditContext) -> AuditContext:
    """The same audit with settings already applied; what was computed stays."""
    return replace(context, options={})


def blocks(x: Tensor, context: AuditContext) -> Iterator[slice]:
    """Slices of the examples that fit into memory, until the budget is spent; at least one."""
    size = max(1, min(len(x), 256, _NUMBERS_AT_ONCE // max(1, x[0].numel())))
    for begin in range(0, len(x), size):
        if begin and context.budget.is_spent:
            return
        context.progress("robustness", begin / len(x))
        yield slice(begin, min(begin + size, len(x)))


def _twin(handle: ModelHandle) -> ModelHandle | None:
    """The model that gives gradients, where it is not the one that ships."""
    return None if handle.via == "direct" else replace(handle, deployed=handle.gradient_model, twin=None, dense=None)


def _joined(parts: Sequence[Rungs]) -> Rungs:
    def cat(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))

    return Rungs(
        cat([p.clean for p in parts]),
        cat([p.outcome for p in parts]),
        cat([p.points for p in parts]),
        {name: cat([p.after[name] for p in parts]) for name in parts[0].after},
        {name: cat([p.alone[name] for p in parts]) for name in parts[0].alone},
        cat([p.inside for p in parts]),
        sum(p.rows for p in parts),
    )


def _gathered(context: AuditContext, rungs: Rungs) -> Rungs:
    """Outcomes of all processes; points stay where they are."""
    own = replace(rungs, outcome=context.gather(rungs.outcome), inside=context.gather(rungs.inside))
    own.after = {name: context.gather(left) for name, left in rungs.after.items()}
    return own


def _ladder_table(context: AuditContext, found: dict[str, Rungs]) -> dict[str, Any]:
    """What is left after each attack, and alone where it ran on all examples."""
    rows: list[list[Any]] = []
    for name in MODELS:
        rungs = found[name]
        rows.append([name, "none", float(context.gather(rungs.clean).mean()), None])
        for attack, left in rungs.after.items():
            alone = rungs.alone.get(attack)
            own = None if alone is None else float(context.gather(alone).mean())
            rows.append([name, attack, float(context.gather(left).mean()), own])
    return {"name": "attacks", "kind": "table", "columns": ["model", "attack", "left standing", "alone"], "rows": rows}


def _matrix_table(context: AuditContext, matrix: dict[tuple[str, str], Tensor]) -> dict[str, Any]:
    rows = [[source, target, float(context.gather(right).mean())] for (source, target), right in matrix.items()]
    return {"name": "transfer", "kind": "table", "columns": ["found on", "tried on", "accuracy"], "rows": rows}
