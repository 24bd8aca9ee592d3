"""Audits while training: a cheap one at validations, a full one at the end, without disturbing the training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_compress import manifest
from lightning_compress.audits.audit import default_audits, run_audits, scorecard_of
from lightning_compress.audits.context import Audit, AuditContext, Budget
from lightning_compress.audits.gates import shares_of
from lightning_compress.audits.handles import InputSpace
from lightning_compress.audits.preparing import Request
from lightning_compress.audits.producing import Production
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.audits.spending import cost_of
from lightning_compress.audits.tasks import TaskName
from lightning_compress.callbacks import audit_inputs, teaching
from lightning_compress.callbacks.base import AUDIT, CompressionCallback
from lightning_compress.callbacks.coordinator import Coordinator
from lightning_compress.callbacks.tracking import Tracker
from lightning_compress.callbacks.whole import WholeCopy
from lightning_compress.distillation.teachers import find_student_module
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

    An audit that cannot be done is listed as SKIPPED. Any other exception ends the fit, and leaves the model as it was
    before the audit. A report that cannot be written, because the disk is full, is a warning: the fit ends well.

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
        audits: Which, instead of those of a tier: all at the end, at validations those up to `validation_tier`.
        references: More models, as for `lightning_compress.audit`, each given like `reference`. Explanations can only
            FAIL against ``"tuned"``, the dense model trained on without compression, or ``"dense"`` of other seeds.
        members: Training examples without augmentation, for privacy; given like `data`. At least 100 are needed.
        nonmembers: Examples that were not trained on; default: those of `data`.
        privacy_examples: How many members, and how many non-members, the full audit takes at most; None: all. The cheap
            audit takes `examples`.
        ood: Inputs of another distribution.
        calibration: What calibrated the model; audited examples must not be among it.
        weights: Axis -> weight in the index.
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
        TypeError: If `reference`, or one of `references`, is no model, or one of `audits` no audit.

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
        audits: Sequence[Audit] | None = None,
        references: Mapping[str, Sequence[nn.Module | Callable[[], nn.Module] | os.PathLike[str] | str]] | None = None,
        members: Any = None,
        nonmembers: Any = None,
        privacy_examples: int | None = 20_000,
        ood: Any = None,
        calibration: Any = None,
        weights: Mapping[str, float] | None = None,
        seconds: float | None = None,
        margins: Mapping[str, float] | None = None,
        energy: bool = False,
        report: Sequence[str] | str | None = None,
        student: str | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        teaching.check_type(reference)
        least = min(examples, final_examples, 1 if privacy_examples is None else privacy_examples)
        if every < 0 or least < 1 or tier not in (0, 1, 2):
            raise ValueError(
                f"expected every >= 0, tier 0, 1 or 2 and at least 1 of all examples; got every={every}, tier={tier}, "
                f"examples={examples}, final_examples={final_examples}, privacy_examples={privacy_examples}"
            )
        if validation_tier not in (0, 1, 2):
            raise ValueError(f"validation_tier is 0, 1 or 2; got {validation_tier!r}")
        self.validation_tier, self.options = validation_tier, dict(options or {})
        self.audits = audit_inputs.checked_audits(audits, self.options, validation_tier if every else 2)
        self.privacy_examples, self.references = privacy_examples, audit_inputs.checked_references(references)
        self.further = {"members": members, "nonmembers": nonmembers, "ood": ood, "calibration": calibration}
        if weights is not None:
            shares_of(weights)  # its own check, now and not after hours
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
        self.margins, self.energy, self.weights = dict(margins or {}), energy, weights
        super().__init__(name)

    # ---------------------------------------------------------------------------------------------------------- life
    def reset(self) -> None:
        """Forget the previous fit."""
        super().reset()
        self.card: Scorecard | None = None
        self.history: list[dict[str, float]] = []
        self._root: nn.Module | None = None
        self._references: dict[str, list[nn.Module]] = {}
        self._prepared: dict[bool, tuple[AuditContext, list[str]]] = {}  # for the cheap audit, and for the full one
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
        for given in (self.reference, *self._further_references()):
            if given != "initial":
                teaching.check_paths(run, self.name, given)

    def needs_unedited_copy(self) -> bool:
        """Paths, ``"initial"`` and the whole of a sharded model are filled into copies of what the user built."""
        paths = any(map(teaching.is_path, (self.reference, *self._further_references())))
        return self._sharded or self.reference == "initial" or paths

    def attach(self, run: Coordinator) -> None:
        """Build the references; they are held by this callback, and so get into no checkpoint and no optimizer."""
        name, _ = find_student_module(run.pl_module, self.student)
        if self._sharded:
            self._whole = WholeCopy(run, self.name)
        self._root = audit_inputs.reference_of(run, self.name, self.reference, name)
        self._references = {
            group: [audit_inputs.reference_of(run, self.name, given, name) for given in several]
            for group, several in self.references.items()
        }

    def _further_references(self) -> list[Any]:
        return [given for several in self.references.values() for given in several]

    def start(self, run: Coordinator) -> None:
        """Place the references beside the model."""
        assert self._root is not None
        for model in (self._root, *(model for several in self._references.values() for model in several)):
            model.to(run.adapter.device)
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
        card = self._audit(trainer, pl_module, full=False)
        self.history.append({"step": float(trainer.global_step), **card.scalars()})
        Tracker(trainer).log_metrics(card.scalars())
        if (run := Coordinator.of(trainer)) is not None:
            for technique in run.techniques:
                technique.audited(run, self.name, card)

    def finish(self, run: Coordinator) -> None:
        """The full audit. Here the model is still on its device; in ``on_fit_end`` it is not."""
        if not self.final:
            return
        self.card = card = self._audit(run.trainer, run.pl_module, full=True)
        for path in self.reports if run.trainer.is_global_zero else ():
            with audit_inputs.full_disk_is_a_warning(self.name, f"to {path!r}"):
                card.save(path)
        with audit_inputs.full_disk_is_a_warning(self.name, "for the loggers"):
            Tracker(run.trainer).log_scorecard(card, self.name)

    def close(self, run: Coordinator) -> None:
        """Let the references go."""
        self._root = self._whole = None
        self._references = {}
        self._prepared = {}
        if self._made is not None:
            self._made.stop()

    # ---------------------------------------------------------------------------------------------------------- work
    def _audit(self, trainer: Trainer, pl_module: LightningModule, full: bool) -> Scorecard:
        model = self._model(trainer, pl_module)
        if full not in self._prepared:
            self._prepared[full] = audit_inputs.prepared(self._request(trainer, model, full), trainer)
        kept, caveats = self._prepared[full]
        handle, caveats = replace(kept.compressed, deployed=model), list(caveats)
        chosen = self._chosen(full)
        names = {one.name for one in chosen}
        context = replace(
            kept, compressed=handle, budget=Budget(self.seconds if full else None), _cache=dict(kept._cache),
            options={name: given for name, given in self.options.items() if name in names},
        )  # fmt: skip
        context, results = run_audits(context, chosen, caveats, say=lambda line: rank_zero_info(f"{self.name}: {line}"))
        if not context.budget.truncated:  # the reference answers once; what it said is kept for the next audit
            kept._cache = {key: value for key, value in context._cache.items() if key == id(kept.dense)}
        spent: dict[str, Any] = {}
        if full and trainer.is_global_zero:
            spent = cost_of(context.dense, context.compressed, context.inputs, energy=self.energy or None)
            spent["production"] = self._produced(trainer)
        identity = self._identity(context, trainer, pl_module)
        return scorecard_of(context, results, spent, caveats, self.weights, identity)

    def _chosen(self, full: bool) -> list[Audit]:
        """Those of a tier; of the user's own the full audit has all."""
        if self.audits is None:
            return default_audits(self.tier if full else self.validation_tier)
        return [one for one in self.audits if full or one.tier <= self.validation_tier]

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

    def _request(self, trainer: Trainer, model: nn.Module, full: bool) -> Request:
        data = audit_inputs.named(self.data, self.seed)
        if data is None:
            data = trainer.val_dataloaders
            while isinstance(data, Mapping | list | tuple) and data:
                data = next(iter(data.values() if isinstance(data, Mapping) else data))
        further = {name: audit_inputs.named(given, self.seed) for name, given in self.further.items()}
        examples, members = (self.final_examples, self.privacy_examples) if full else (self.examples, self.examples)
        return Request(
            self._root, model, data, task=self.task, space=self.space, normalized=self.normalized, examples=examples,
            privacy_examples=members, seed=self.seed, references=self._references, margins=self.margins,
            rank=trainer.global_rank, world=trainer.world_size, **further,
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
