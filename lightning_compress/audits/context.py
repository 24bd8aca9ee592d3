"""What an audit gets: two models, the examples, a budget, and what it may spend."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.audits.comparing import compare
from lightning_compress.audits.data import Examples
from lightning_compress.audits.handles import ModelHandle, count, take
from lightning_compress.audits.integrity import GradientTrust, gradient_probe
from lightning_compress.audits.remembered import Remembered, devices_of, from_text, to_text
from lightning_compress.audits.results import AuditResult, Check, Metric
from lightning_compress.audits.tasks import Task
from lightning_compress.errors import CompressionError
from lightning_compress.nested import map_tensors, tensors_in
from lightning_compress.writing import PathLike

T = TypeVar("T")

MARGINS: dict[str, float] = {
    "fidelity.accuracy": 0.01,
    "fidelity.within_tolerance": 0.01,
    "fidelity.mean_iou": 0.01,
    "fidelity.token_accuracy": 0.01,
    "fidelity.next_token_accuracy": 0.01,
    "forgetting.worst_class": 0.05,
    "calibration.ece_debiased": 0.02,
    "robustness.auc": 0.02,
    "robustness.robust_accuracy": 0.02,
    "robustness.embedding_accuracy": 0.02,
    "robustness.corruption_accuracy": 0.02,
    "explanation.agreement": 0.2,
    "privacy.auc": 0.02,
    "privacy.tpr_at_1_percent": 0.02,
    "supply_chain.trigger": 0.05,
    "supply_chain.dormant_trigger": 0.5,
}


class Budget:
    """How long an audit may take and how many examples it may look at.

    Args:
        seconds: Of wall-clock time for all audits together; None: no limit. An audit that is running is not killed: it
            asks, and stops at the next batch.
        examples: At most that many; None: all.
        clock: Returns seconds; for tests.

    Example:
        >>> budget = Budget(examples=100)
        >>> budget.is_spent, budget.truncated
        (False, False)
    """

    def __init__(
        self,
        seconds: float | None = None,
        examples: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if seconds is not None and seconds <= 0:
            raise ValueError(f"a budget has a positive number of seconds, or None; got {seconds}")
        if examples is not None and examples < 1:
            raise ValueError(f"a budget has at least one example, or None; got {examples}")
        self.seconds, self.examples, self._clock = seconds, examples, clock
        self.truncated = False
        self._started = clock()

    def start(self) -> Budget:
        """Count from now."""
        self._started, self.truncated = self._clock(), False
        return self

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    @property
    def left(self) -> float:
        """Seconds left; infinite without a limit."""
        return float("inf") if self.seconds is None else max(0.0, self.seconds - self.used)

    @property
    def is_spent(self) -> bool:
        """Whether the time is over; noted in `truncated` if so."""
        if self.left > 0:
            return False
        self.truncated = True
        return True


def alone(value: Any) -> list[Any]:
    """What all processes say, where each of them has everything."""
    return [value]


@dataclass(frozen=True)
class Failure:
    """Sent in place of what the others wait for."""

    reason: str


class FailedElsewhere(Exception):
    """Another process cannot go on. No `CompressionError`: an audit that copes with its own errors goes on alone."""


@dataclass(eq=False)
class AuditContext:
    """Two models and the examples they are compared on.

    Attributes:
        dense: The reference.
        compressed: What is audited.
        task: What being right means.
        inputs: Raw inputs (N, ...), this process's share.
        targets: (N, ...).
        ids: (N,) int64; per-example random numbers are seeded by them.
        seed: Of everything random.
        budget: What may be spent.
        references: Further models: `"dense"` and `"compressed"` (other seeds of each), `"tuned"` (the dense model
            trained on without compression), whatever an audit asks for.
        members: Training examples, un-augmented, for privacy audits.
        nonmembers: Examples of the same distribution that were not trained on; default: those of the audit.
        ood: Inputs of another distribution.
        margins: `"family.metric"` -> how much worse is acceptable.
        options: Audit name -> what the user passes on to it.
        tier: The highest of the audits that run: what it may cost.
        all_gather: Takes an object of this process and gives those of all, in the order of ranks; all processes call it
            equally often. Audits use what is built on it: `gather`, `agree`, `is_spent` and `together`.
        progress: Is told what is being done, and the share done in [0, 1] or None.
        remembered: What the dense model did in earlier audits; None: everything is computed.
    """

    dense: ModelHandle
    compressed: ModelHandle
    task: Task
    inputs: Any
    targets: Any
    ids: Tensor
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    references: Mapping[str, Sequence[ModelHandle]] = field(default_factory=dict)
    members: Examples | None = None
    nonmembers: Examples | None = None
    ood: Any = None
    margins: Mapping[str, float] = field(default_factory=lambda: MARGINS)
    options: Mapping[str, Any] = field(default_factory=dict)
    tier: int = 1
    all_gather: Callable[[Any], list[Any]] = alone
    progress: Callable[[str, float | None], None] = lambda message, share: None
    remembered: Remembered | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module that the guard has to watch."""
        handles = [self.dense, self.compressed, *(handle for group in self.references.values() for handle in group)]
        return tuple({id(m): m for handle in handles for m in handle.modules}.values())

    def logits(self, which: str | ModelHandle) -> Tensor:
        """Answers of a model to all inputs, computed once: `"dense"`, `"compressed"`, or a handle."""
        handle = getattr(self, which) if isinstance(which, str) else which
        if id(handle) not in self._cache:
            self._cache[id(handle)] = (handle, handle.predict(self.inputs))  # the handle too: ids of dead ones return
        logits: Tensor = self._cache[id(handle)][1]
        return logits

    # ---------------------------------------------------------------------------------------------------- processes
    def exchange(self, value: T) -> list[T]:
        """What every process has, in the order of ranks.

        Raises:
            FailedElsewhere: Another process has an error instead.
        """
        parts = self.all_gather(value)
        failed = next((part for part in parts if isinstance(part, Failure)), None)
        if failed is not None and not isinstance(value, Failure):
            raise FailedElsewhere(failed.reason)
        return parts

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes along dimension 0, in the order in which one process would have them.

        Where there is one for each example that is the order of ids; others were dealt out in turn.
        """
        if self.all_gather is alone:
            return values
        ids = self.ids.cpu() if len(values) == len(self) else None
        parts = self.exchange((values.detach().cpu(), ids))
        places = [part[1] for part in parts if part[1] is not None]
        if len(places) < len(parts):
            places = [torch.arange(len(part[0])) * len(parts) + rank for rank, part in enumerate(parts)]
        return torch.cat([part[0] for part in parts])[torch.cat(places).argsort()].to(values.device)

    def agree(self, flag: bool) -> bool:
        """Whether something is so in any process."""
        return any(self.exchange(flag))

    def is_spent(self) -> bool:
        """Whether the time is over in any process: for decisions that all of them have to take alike."""
        spent = self.agree(self.budget.is_spent)
        self.budget.truncated |= spent
        return spent

    def together(self, work: Callable[[], T]) -> T:
        """Do something in all processes, or in none: one that cannot tells those that wait for it.

        Raises:
            CompressionError: It could not be done here, or in another process.
        """
        try:
            found = work()
            self.exchange(None)  # nobody goes on before all of them are through
        except FailedElsewhere as error:
            raise CompressionError(str(error)) from error
        except CompressionError as error:
            self.exchange(Failure(str(error)))
            raise
        return found

    def agreed(self, checks: Iterable[Check]) -> list[Check]:
        """The checks of all processes: of those of one name the one that failed, if any did."""
        found: dict[tuple[str, int], Check] = {}
        for part in self.exchange(list(checks)):
            seen: Counter[str] = Counter()  # dense and compressed may have a check of the same name
            for check in part:
                key = (check.check, seen[check.check])
                seen[check.check] += 1
                if key not in found or (found[key].ok and not check.ok):
                    found[key] = check
        return list(found.values())

    def answered(self) -> AuditContext:
        """Let both models answer all examples while the budget lasts; the context of those that were answered."""
        order = sorted(range(len(self)), key=lambda i: self._place(int(self.ids[i])))
        size = max(1, min(self.dense.batch_size, self.compressed.batch_size))
        parts: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(self), size):
            if start and self.budget.is_spent:
                break
            index = torch.tensor(order[start : start + size])
            x = take(self.inputs, index)
            known = self._cache.get(id(self.dense))  # the reference may have answered in an earlier audit
            dense = self.dense.predict(x) if known is None else known[1][index.to(known[1].device)]
            parts.append((dense, self.compressed.predict(x)))
            self.progress(f"{start + count(x)} of {len(self)} examples", (start + count(x)) / len(self))
        seen = torch.tensor(order[: sum(len(part[0]) for part in parts)])
        kept, back = seen.sort()
        own = Examples(self.inputs, self.targets, self.ids)[kept]
        answered = replace(self, inputs=own.inputs, targets=own.targets, ids=own.ids, _cache={})
        for i, handle in enumerate((self.dense, self.compressed)):
            logits = torch.cat([part[i] for part in parts])
            answered._cache[id(handle)] = (handle, logits[back.to(logits.device)])
        return answered

    def gradients(self, which: str = "compressed") -> GradientTrust:
        """Whether gradients of a model mean anything, probed once on a few examples."""
        key = ("gradients", which)
        if key not in self._cache:
            few = self.whole(24)  # every process has to come to the same decisions
            handle: ModelHandle = getattr(self, which)

            def probe() -> dict[str, Tensor]:
                found = gradient_probe(handle, few.inputs, few.targets, self.task, directions=6, seed=self.seed)
                return {"trust": to_text(asdict(self.exchange(found)[0]))}

            kept = few.of_dense("gradients", {"via": handle.via}, probe) if which == "dense" else probe()
            self._cache[key] = GradientTrust(**from_text(kept["trust"]))
        trust: GradientTrust = self._cache[key]
        return trust

    def remembering(self, folder: PathLike) -> AuditContext:
        """The same audit, with what the dense model did on these examples kept in files of a folder."""
        task = {"name": self.task.name, **vars(self.task)}
        about = {
            "inputs": list(tensors_in(self.inputs)), "targets": self.targets, "ids": self.ids, "seed": self.seed,
            "task": task, "devices": devices_of(self.inputs),
        }  # fmt: skip
        return replace(self, remembered=Remembered(folder, self.dense, self.logits("dense"), about))

    def of_dense(
        self, part: str, arguments: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Tensors that depend on the dense model and the examples of this context alone, remembered or computed.

        Args:
            part: Of an audit.
            arguments: All else that they depend on.
            compute: Makes them.
        """
        if self.remembered is None:
            return compute()
        return self.remembered.get(part, {**arguments, "ids": self.ids}, compute)

    def margin(self, family: str, name: str) -> float | None:
        """How much worse is acceptable; None if nobody said."""
        return self.margins.get(f"{family}.{name}")

    def compare(self, name: str, family: str, dense: Tensor, compressed: Tensor, **fields: Any) -> Metric:
        """`comparing.compare` of one value an example, over all processes, with the margin of this audit."""
        fields.setdefault("margin", self.margin(family, name))
        fields["truncated"] = self.agree(fields.get("truncated", self.budget.truncated))
        fields["trust"] = self.agreed(fields.get("trust", ()))
        fields.setdefault("single_seed", not self.references.get("compressed"))
        return compare(name, family, self.gather(dense), self.gather(compressed), seed=self.seed, **fields)

    # ------------------------------------------------------------------------------------------------ fewer examples
    def limited(self, examples: int) -> AuditContext:
        """The same audit on fewer examples: those whose ids come first in an order that only the seed decides.

        They are chosen out of those of all processes, and each keeps its own. Where one would be left with none, all of
        them get all the chosen ones, as from `whole`.
        """
        chosen, shares = self._chosen(examples)
        if len(chosen) == sum(map(len, shares)):
            return self
        if any(chosen.isdisjoint(share) for share in shares):
            return self.whole(examples)
        return self._kept(chosen)

    def whole(self, examples: int) -> AuditContext:
        """The same few examples in every process, for work that cannot be divided; members and the like are not shared.

        Args:
            examples: How many at most, of all processes; chosen as by `limited`.
        """
        kept = self._kept(self._chosen(examples)[0])
        if self.all_gather is alone:
            return kept
        inputs, targets = (map_tensors(kept.gather, values) for values in (kept.inputs, kept.targets))
        return replace(kept, inputs=inputs, targets=targets, ids=kept.gather(kept.ids), all_gather=alone, _cache={})

    def _chosen(self, examples: int) -> tuple[set[int], list[list[int]]]:
        """Ids of the chosen examples, and those that each process has."""
        shares = self.exchange(self.ids.tolist())
        return set(sorted(chain(*shares), key=self._place)[:examples]), shares

    def _kept(self, chosen: set[int]) -> AuditContext:
        """Those of the examples of this process that were chosen, with the answers to them."""
        kept = torch.tensor([i for i, id_ in enumerate(self.ids.tolist()) if id_ in chosen], dtype=torch.long)
        own = Examples(self.inputs, self.targets, self.ids)[kept]
        fewer = replace(self, inputs=own.inputs, targets=own.targets, ids=own.ids, _cache={})
        for key, value in self._cache.items():
            if isinstance(key, int):
                fewer._cache[key] = (value[0], value[1][kept.to(value[1].device)])
        return fewer

    def _place(self, number: int) -> int:
        """Where an id comes in the order in which examples are chosen."""
        return _mixed(self.seed, number)


def _mixed(seed: int, number: int) -> int:
    """A number that looks random and depends on both (splitmix64)."""
    mask = (1 << 64) - 1
    x = (number + 0x9E3779B97F4A7C15 * (seed + 1)) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


class Audit(Protocol):
    """Something that looks at two models and reports.

    Attributes:
        name: Of the audit.
        family: Section of the scorecard.
        tier: 0: seconds, no gradients. 1: under a minute. 2: minutes, or needs more models.
    """

    name: str
    family: str
    tier: int

    def run(self, context: AuditContext) -> AuditResult:
        """Look at the models, inside of the guard."""
