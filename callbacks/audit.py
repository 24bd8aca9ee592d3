"""Audits while training: a cheap one at validations, a full one at the end, without disturbing the training."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_compress import manifest
from lightning_compress.audits.audit import default_audits, run_audits, scorecard_of
from lightning_compress.audits.context import AuditContext, Budget
from lightning_compress.audits.handles import InputSpace
from lightning_compress.audits.preparing import Request, prepare
from lightning_compress.audits.producing import Production
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.audits.spending import cost_of
from lightning_compress.audits.tasks import TaskName
from lightning_compress.callbacks import teaching
from lightning_compress.callbacks.base import AUDIT, CompressionCallback
from lightning_compress.callbacks.coordinator import Coordinator
from lightning_compress.callbacks.tracking import Tracker
from lightning_compress.callbacks.whole import WholeCopy
from lightning_compress.distillation.teachers import find_student_module, resolve_teacher_module
from lightning_compress.errors import CompressionError
from lightning_compress.writing import require

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer


class CompressionAudit(CompressionCallback):
    """Compares the model in training with its dense reference: cheaply at validations, fully when training ends.

    The training is bit for bit the one without it: modes, gradients, buffers and random numbers are put back. Examples
    are dealt out to the processes, each attacks its own, and statistics are made of all of them. Numbers go to the
    Trainer's loggers as ``audit/<family>/<metric>`` with ``_lo``, ``_hi`` and ``_delta``; W&B also gets the page and
    the files of the scorecard. What is audited is the model at that moment: where an averaging callback ships other
    weights, audit the saved file with ``lightning-compress audit``.

    Args:
        reference: The dense model: a checkpoint path, a module, ``"package.module:function"``, or ``"initial"`` for the
            model as it is when training begins.
        data: Held-out data, as for `lightning_compress.audit`, or ``"package.module:name"``; default: the Trainer's
            validation data. Data that chose the sparsity flatters it: better give a part of its own.
        space: Lowest and highest value of raw inputs.
        mean: Normalisation that is not part of the model.
        std: Likewise.
        normalized: Whether `data` is normalised by `mean` and `std`.
        task: Default: what answers and targets look like.
        every: A cheap audit each that many validations; 0: none.
        examples: Of the cheap audit.
        final: Whether there is a full audit at the end of training.
        final_examples: Of the full audit.
        tier: Of the full audit: 0, 1 or 2.
        validation_tier: Of the cheap audit; 1 also attacks and explains, on few `examples`.
        options: Audit name -> arguments that it is given, as for `lightning_compress.audit`.
        seconds: Time for the audits of the end; what is cut short says so.
        margins: ``"family.metric"`` -> how much worse is acceptable.
        energy: Measure the joules of this fit, and of running both models, by codecarbon without a network; False:
            those of running alone, where it is installed.
        report: Files to write the final scorecard to, ending in ``.html``, ``.json`` or ``.md``; one or several.
        student: Name of the part that takes inputs and gives logits; default: found as for `Distillation`.
        seed: Of everything random.
        name: Tells two instances apart.

    Raises:
        ValueError: If a number or the ending of a report is none that is possible.
        TypeError: If `reference` is no model.

    Example:
        >>> import lightning as L
        >>> from lightning_compress.callbacks import CompressionAudit
        >>> from lightning_compress.callbacks.testing import TinyNet, tiny_loader
        >>> audit = CompressionAudit(reference=TinyNet(width=8), tier=0)
        >>> trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[audit],
        ...                     enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
        >>> trainer.fit(TinyNet(width=4), tiny_loader(), tiny_loader())
        >>> audit.card["fidelity.accuracy"].n
        64
    """

    order: ClassVar[int] = AUDIT

    def __init__(
        self,
        reference: nn.Module | Callable[[], nn.Module] | os.PathLike[str] | str,
        data: Any = None,
        space: Sequence[float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        normalized: bool = False,
        task: TaskName | None = None,
        every: int = 1,
        examples: int = 256,
        final: bool = True,
        final_examples: int = 1000,
        tier: int = 1,
        validation_tier: int = 0,
        options: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        margins: Mapping[str, float] | None = None,
        energy: bool = False,
        report: Sequence[str] | str | None = None,
        student: str | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        teaching.check_type(reference)
        if every < 0 or min(examples, final_examples) < 1 or tier not in (0, 1, 2):
            raise ValueError(
                f"expected every >= 0, examples >= 1, final_examples >= 1 and tier 0, 1 or 2; got every={every}, "
                f"examples={examples}, final_examples={final_examples}, tier={tier}"
            )
        if validation_tier not in (0, 1, 2):
            raise ValueError(f"validation_tier is 0, 1 or 2; got {validation_tier!r}")
        self.validation_tier, self.options = validation_tier, dict(options or {})
        if space is not None and len(space) != 2:
            raise ValueError(f"space is the lowest and the highest value of raw inputs; got {list(space)}")
        if space is None and (mean is not None or std is not None):
            raise ValueError("mean and std need space, the range of raw inputs")
        self.reports = [report] if isinstance(report, str) else list(report or ())
        wrong = [path for path in self.reports if Path(path).suffix not in (".html", ".json", ".md")]
        if wrong:
            raise ValueError(f"a report ends in .html, .json or .md; got {wrong[0]!r}")
        Budget(seconds)  # its own check
        self.reference, self.data, self.task, self.student, self.seed = reference, data, task, student, seed
        self.space = None if space is None else InputSpace(float(space[0]), float(space[1]), mean, std)
        self.normalized, self.every, self.examples, self.final = normalized, every, examples, final
        self.final_examples, self.tier, self.seconds = final_examples, tier, seconds
        self.margins, self.energy = dict(margins or {}), energy
        super().__init__(name)

    # ---------------------------------------------------------------------------------------------------------- life
    def reset(self) -> None:
        """Forget the previous fit."""
        super().reset()
        self.card: Scorecard | None = None
        self.history: list[dict[str, float]] = []
        self._root: nn.Module | None = None
        self._contexts: dict[int, AuditContext] = {}
        self._caveats: dict[int, list[str]] = {}
        self._validations = 0
        self._sharded = False
        self._whole: WholeCopy | None = None
        self._made: Production | None = None
        self._first_step = 0

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        run.adapter.require("audits during a fit", self.name)
        self._sharded = run.adapter.is_sharded
        if self.energy:
            require("codecarbon", extra="energy")
        if self.reference == "initial" and run.continues:
            raise CompressionError(
                f"{self.name}: this fit goes on with an older one, so the model is not what training began with; pass "
                "the path of the dense checkpoint as reference"
            )
        if self.needs_unedited_copy() and self.reference != "initial":
            teaching.check_paths(run, self.name, self.reference)

    def needs_unedited_copy(self) -> bool:
        """Paths, ``"initial"`` and the whole of a sharded model are filled into copies of what the user built."""
        return self._sharded or self.reference == "initial" or teaching.is_path(self.reference)

    def attach(self, run: Coordinator) -> None:
        """Build the reference; it is held by this callback, and so gets into no checkpoint and no optimizer."""
        name, _ = find_student_module(run.pl_module, self.student)
        root = teaching.build(run, self.name, self.reference, name)
        if self._sharded:
            self._whole = WholeCopy(run, self.name)
        elif self.reference == "initial":  # copies of a sharded model have its weights from before it was sharded
            _take_weights(root, run.pl_module)
        mine = {id(parameter) for parameter in run.pl_module.parameters()}
        if any(id(parameter) in mine for parameter in root.parameters()):
            raise CompressionError(f"{self.name}: the reference is the model itself; pass a copy (copy.deepcopy)")
        self._root = resolve_teacher_module(root, name, run.pl_module)

    def start(self, run: Coordinator) -> None:
        """Place the reference beside the model."""
        assert self._root is not None
        self._root.to(run.adapter.device)
        self._made, self._first_step = Production(self.energy and run.trainer.is_global_zero), run.trainer.global_step
        self._made.start()
        if self.data is None and not run.trainer.enable_validation:
            raise CompressionError(
                f"{self.name}: this fit has no validation data; pass held-out data as `data=`, such as a DataLoader"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The cheap audit; gradients are off here, and the guard turns them on for audits that need them."""
        if trainer.sanity_checking or self._root is None or trainer.state.fn != "fit" or not self.every:
            return
        self._validations += 1
        if self._validations % self.every:
            return
        card = self._audit(trainer, pl_module, tier=self.validation_tier, examples=self.examples, seconds=None)
        self.history.append({"step": float(trainer.global_step), **card.scalars()})
        Tracker(trainer).log_metrics(card.scalars())
        if (run := Coordinator.of(trainer)) is not None:
            for technique in run.techniques:
                technique.audited(run, self.name, card)

    def finish(self, run: Coordinator) -> None:
        """The full audit. Here the model is still on its device; in ``on_fit_end`` it is not."""
        if not self.final:
            return
        card = self._audit(run.trainer, run.pl_module, self.tier, self.final_examples, self.seconds, cost=True)
        self.card = card
        Tracker(run.trainer).log_scorecard(card, self.name)
        if run.trainer.is_global_zero:
            for path in self.reports:
                card.save(path)

    def close(self, run: Coordinator) -> None:
        """Let the reference go."""
        self._root = self._whole = None
        self._contexts, self._caveats = {}, {}
        if self._made is not None:
            self._made.stop()

    # ---------------------------------------------------------------------------------------------------------- work
    def _audit(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        tier: int,
        examples: int,
        seconds: float | None,
        cost: bool = False,
    ) -> Scorecard:
        model = self._model(trainer, pl_module)
        if examples not in self._contexts:
            self._caveats[examples] = []
            request = self._request(trainer, model, examples)
            self._contexts[examples] = _shared(prepare(request, self._caveats[examples]), trainer)
        kept = self._contexts[examples]
        handle = replace(kept.compressed, deployed=model)
        context = replace(kept, compressed=handle, budget=Budget(seconds, examples), _cache=dict(kept._cache))
        caveats = list(self._caveats[examples])
        context, results = run_audits(context, default_audits(tier), caveats)
        if not context.budget.truncated:  # the reference answers once; what it said is kept for the next audit
            kept._cache = {key: value for key, value in context._cache.items() if key == id(kept.dense)}
        spent: dict[str, Any] = {}
        if cost and trainer.is_global_zero:
            spent = cost_of(context.dense, context.compressed, context.inputs, energy=self.energy or None)
            spent["production"] = self._produced(trainer)
        return scorecard_of(context, results, spent, caveats, None, self._identity(context, trainer, pl_module))

    def _model(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        """The part that is audited; under a sharded strategy that of a whole copy."""
        run = Coordinator.of(trainer)
        if self._whole is not None and run is not None:
            pl_module = self._whole.fill(run)
        return find_student_module(pl_module, self.student)[1]

    def _produced(self, trainer: Trainer) -> dict[str, Any]:
        """What this fit has cost so far; an older one that it goes on with is not in it."""
        assert self._made is not None
        self._made.stop()
        loader = trainer.train_dataloader
        data = getattr(loader, "dataset", None)
        self._made.note(
            steps=trainer.global_step - self._first_step,
            epochs=trainer.current_epoch,
            examples=len(data) if isinstance(data, Sized) else None,
        )
        return self._made.to_dict()

    def _request(self, trainer: Trainer, model: nn.Module, examples: int) -> Request:
        data = _named(self.data) if isinstance(self.data, str) else self.data
        if data is None:
            data = trainer.val_dataloaders
            while isinstance(data, Mapping | list | tuple) and data:
                data = next(iter(data.values() if isinstance(data, Mapping) else data))
        return Request(
            self._root, model, data, task=self.task, space=self.space, normalized=self.normalized, examples=examples,
            seed=self.seed, margins=self.margins, options=self.options, rank=trainer.global_rank,
            world=trainer.world_size,
        )  # fmt: skip

    def _identity(self, context: AuditContext, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        edits = [str(edit.get("kind")) for edit in manifest.edits_of(pl_module)]
        return {
            "name": type(pl_module).__name__,
            "reference": self.reference if isinstance(self.reference, str) else type(self._root).__name__,
            "task": context.task.name,
            "data": "validation data of the Trainer" if self.data is None else str(self.data)[:80],
            "examples": int(context.gather(context.ids).numel()),
            "seed": self.seed,
            "step": trainer.global_step,
            "steps_of_compression": {kind: edits.count(kind) for kind in dict.fromkeys(edits)},
            "processes": trainer.world_size,
        }


def _shared(context: AuditContext, trainer: Trainer) -> AuditContext:
    """A context whose examples are dealt out to the processes of a Trainer."""
    if trainer.world_size == 1:
        return context
    own = len(context.ids)

    def gather(values: Tensor) -> Tensor:
        parts: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(parts, (values.detach().cpu(), context.ids, len(values) == own))
        joined = torch.cat([part[0] for part in parts])
        if all(part[2] for part in parts):  # all examples: in the order that one process has them in
            joined = joined[torch.cat([part[1] for part in parts]).argsort()]
        return joined.to(values.device)

    def agree(flag: bool) -> bool:
        flags: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(flags, flag)
        return any(flags)

    return replace(context, gather=gather, agree=agree)


def _take_weights(root: nn.Module, source: nn.Module) -> None:
    """The weights as they are now, unless shapes were changed at setup: then those from before stay."""
    state = manifest.without_auxiliary(source.state_dict(), root)
    own = root.state_dict()
    if {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in own.items()}:
        root.load_state_dict(state)


def _named(source: str) -> Any:
    """What ``package.module:name`` names, called if it is a class or a function."""
    module, _, name = source.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CompressionError(f"data={source!r} is no package.module:name that can be imported: {error}") from error
    return found() if callable(found) else found
