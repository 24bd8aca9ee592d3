"""Low-rank factors in the place of dense layers, from the middle of a fit on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_compress import manifest
from lightning_compress.callbacks.base import STRUCTURE, CompressionCallback
from lightning_compress.callbacks.low_rank_work import Work
from lightning_compress.callbacks.rewarming import Rewarming
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank.convergence import has_converged
from lightning_compress.low_rank.decay import FrobeniusDecay
from lightning_compress.low_rank.planning import Settings
from lightning_compress.low_rank.replacement import REPLACE, StateMode
from lightning_compress.low_rank.units import ConvMethod
from lightning_compress.probe import from_example_inputs
from lightning_compress.schedule import Schedule, Scheduled
from lightning_compress.targets import as_patterns

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.decisions import Decision

Rule = Literal["energy", "ratio", "stable", "evbmf", "full"]
_RULES = get_args(Rule)
COLD = 0.1  # the factor of the learning rate with which re-warming starts
_AT, _AUTO = Schedule(begin="30%"), Schedule(begin="5%", end="50%", every="1 epoch")


class LowRank(CompressionCallback):
    """Replaces layers by products of smaller ones while the model trains, where that pays.

    Training starts dense, which finds better weights than starting with factors, and switches later: at a scheduled
    step, or once the ranks of all layers have settled (Cuttlefish, Wang et al., MLSys 2023; Pufferfish, Wang et al.,
    MLSys 2021). Linear layers, convolutions, embeddings, attention and recurrent layers become sequences of plain
    layers. A layer whose factors would not be smaller stays dense, and the reason is printed; its latency on this
    machine is looked at with `probe_latency`.

    Momentum of SGD is projected exactly onto the factors. Moments of Adam restart, with their bias correction, unless
    ``optimizer_state="project"``.

    Args:
        rank: How ranks are chosen: ``"energy"`` (share `energy` of the squared singular values), ``"ratio"`` (share
            `ratio` of each layer's parameters), ``"stable"`` (stable rank, scaled as in Cuttlefish), ``"evbmf"`` (what
            variational Bayes takes for more than noise), ``"full"`` (all independent directions: an exact
            decomposition of layers that have fewer than they could), or one number for all layers.
        energy: Share of the squared singular values to keep, in (0, 1].
        ratio: Share of each layer's parameters that its factors may have, in (0, 1).
        keep_macs: Instead of `rank`, one budget for all layers: share of the model's multiply-accumulates.
        keep_parameters: The same for parameters.
        latency: The same for seconds of the example call on this machine, measured once.
        method: For convolutions: ``"channel"`` (k x k, then 1 x 1), ``"spatial"`` (k x 1, then 1 x k), ``"tucker"``
            (1 x 1, k x k, 1 x 1) or ``"cp"``, which hardly pays on trained convolutions.
        mode: ``"replace"`` changes the layers at the switch. ``"masked"`` puts factors of full rank in their place at
            setup, zeroes directions at the switch, and cuts them away at the end: shapes never change in mid-fit, as
            FSDP needs.
        when: ``"schedule"`` switches at the first step of `schedule`. ``"auto"`` measures at each of its events, and
            switches when ranks have settled, at the latest at its last one.
        schedule: Default: at 30 %, or for ``"auto"`` each epoch from 5 % to 50 %. ``"setup"`` switches before training.
        window: Measurements over which ranks have to be settled, for ``when="auto"``.
        tolerance: Relative change for each measurement that counts as settled.
        whiten: Choose directions by what they do to real activations (SVD-LLM, Wang et al., ICLR 2025) instead of by
            weights alone; for linear layers and channel factors.
        calibration_samples: Training samples for that.
        optimizer_state: ``"restart"`` or ``"project"``: what becomes of Adam's moments.
        frobenius_decay: Weight decay of the products instead of their factors; set the optimizer's to 0 for them.
        rewarm: For how long the learning rate comes back from a tenth after the switch, such as ``"2%"``.
        min_gain: Factors have to cost less than this share of the dense layer, in (0, 1]; of an embedding only
            parameters count, since looking rows up takes no multiplication.
        multiple_of: Ranks are rounded up to multiples of it, down for ``"ratio"``.
        keep_first_last: The first and the last layer stay dense.
        probe_latency: Time each layer with and without factors on the example call, and keep those dense that would
            become slower.
        compact: In masked mode, cut zero directions away when the fit ends, where the strategy lets shapes change.
        targets: Name patterns or types of layers.
        exclude: Name patterns or types to leave out.
        example_inputs: Arguments of ``forward`` for a small batch; default ``example_input_array``, else what the
            model gets from a training batch.
        reset_monitors: At the switch, EarlyStopping and ModelCheckpoint judge anew; the dense model's best files stay.
        hold_early_stopping: Keep EarlyStopping from judging before the switch.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range, or two exclude each other.

    Example:
        >>> from lightning_compress.callbacks import LowRank
        >>> LowRank(keep_macs=0.5).settings.budget
        'macs'
        >>> LowRank("stable", when="auto").schedule.every
        '1 epoch'
    """

    order = STRUCTURE
    changes_structure: ClassVar[bool] = True

    def __init__(
        self,
        rank: Rule | int = "energy",
        energy: float = 0.9,
        ratio: float = 0.5,
        keep_macs: float | None = None,
        keep_parameters: float | None = None,
        latency: float | None = None,
        method: ConvMethod = "channel",
        mode: Literal["replace", "masked"] = "replace",
        when: Literal["schedule", "auto"] = "schedule",
        schedule: Schedule | Literal["setup"] | None = None,
        window: int = 5,
        tolerance: float = 0.02,
        whiten: bool = False,
        calibration_samples: int = 256,
        optimizer_state: StateMode = "restart",
        frobenius_decay: float | Scheduled = 0.0,
        rewarm: int | float | str | None = None,
        min_gain: float = 0.9,
        multiple_of: int = 8,
        keep_first_last: bool = True,
        probe_latency: bool = False,
        compact: bool = True,
        targets: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        example_inputs: Any = None,
        reset_monitors: bool = True,
        hold_early_stopping: bool = True,
        name: str | None = None,
    ) -> None:
        for argument, value, known in (
            ("method", method, ("channel", "spatial", "tucker", "cp")), ("mode", mode, ("replace", "masked")),
            ("when", when, ("schedule", "auto")), ("optimizer_state", optimizer_state, ("restart", "project")),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{argument} is one of {known}; got {value!r}")
        self.at_start = schedule == "setup"
        super().__init__(name, _schedule(schedule, when))
        for argument, number in (
            ("window", window),
            ("calibration_samples", calibration_samples),
            ("multiple_of", multiple_of),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{argument} is a whole number, at least 1; got {number!r}")
        if not _is_number(tolerance) or tolerance <= 0:
            raise ValueError(f"tolerance is a relative change, more than 0; got {tolerance!r}")
        budgets = {"macs": keep_macs, "parameters": keep_parameters, "latency": latency}
        self.settings = _settings(rank, energy, ratio, budgets, min_gain, multiple_of, probe_latency)
        self._check_mix(mode, when, whiten, method)
        if rewarm is not None:
            Schedule(begin=rewarm)
        as_patterns("targets", targets)
        as_patterns("exclude", exclude)
        if example_inputs is not None:
            from_example_inputs(example_inputs)
        self.method, self.mode, self.when, self.whiten = method, mode, when, whiten
        self.window, self.tolerance, self.samples = window, tolerance, calibration_samples
        self.optimizer_state, self.rewarm, self.frobenius_decay = optimizer_state, rewarm, frobenius_decay
        FrobeniusDecay(frobenius_decay, lambda: None, self.name)  # type: ignore[arg-type, return-value]
        self.keep_first_last, self.compact = keep_first_last, compact
        self.targets, self.exclude, self.example_inputs = targets, exclude, example_inputs
        self.reset_monitors, self.hold_early_stopping = reset_monitors, hold_early_stopping

    def _check_mix(self, mode: str, when: str, whiten: bool, method: str) -> None:
        if self.at_start and (when == "auto" or mode == "masked" or whiten):
            raise ValueError("schedule='setup' switches before training: without when='auto', mode='masked' and whiten")
        timed = self.settings.probe or self.settings.budget == "latency"
        if mode == "masked" and timed:
            raise ValueError("latency= and probe_latency= time dense layers, which mode='masked' does not have")
        if mode == "masked" and method == "cp":
            raise ValueError("mode='masked' begins at full rank, which method='cp' cannot compute; use another method")

    # ------------------------------------------------------------------------------------------------------ life
    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self._decay: FrobeniusDecay | None = None
        self._handles: list[Any] = []
        self._rewarm_steps = 0
        self._checked = False

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        if self.mode == "masked":
            run.adapter.require("low rank, masked", self.name)
        else:
            at_start = "structure, at the start or from a checkpoint"
            run.adapter.require(at_start if self.at_start else "low rank, mid-fit", self.name)
        run.adapter.check_structure()
        if self.frobenius_decay and run.adapter.kind == "fsdp1":
            raise CompressionError(
                f"{self.name}: frobenius_decay needs whole factors, and FSDP1 keeps them in one flat tensor; leave it "
                "out, or use ModelParallelStrategy (FSDP2)"
            )
        quantizing = [t.name for t in run.techniques if type(t).__name__ == "QuantizationAwareTraining"]
        if quantizing and self.mode == "replace" and not self.at_start:
            raise CompressionError(
                f"{self.name} would make layers in mid-fit, which the quantizers of {quantizing[0]} cannot follow; use "
                "schedule='setup' or mode='masked', where the factors are there before the quantizers are attached"
            )
        if self.whiten and not run.pl_module.automatic_optimization:
            raise CompressionError(
                f"{self.name}: a manually optimized step cannot be rehearsed to whiten; leave it out"
            )

    def at_setup(self, run: Coordinator) -> None:
        """Switch, or put factors of full rank in place, unless a checkpoint has brought them along."""
        if any(e.get("by") == self.name and e.get("kind") == REPLACE for e in manifest.edits_of(run.pl_module)):
            return
        if self.mode == "masked":
            Work(self, run).begin_masked()
        elif self.at_start:
            Work(self, run).replace(0)

    def attach(self, run: Coordinator) -> None:
        """See `CompressionCallback.attach`."""
        if self.frobenius_decay:
            self._decay = FrobeniusDecay(self.frobenius_decay, lambda: run.pl_module, self.name)
            run.pipeline.add_gradient_term(self._decay)

    def before_tuning(self, run: Coordinator) -> None:
        """See `CompressionCallback.before_tuning`."""
        if self._decay is not None:
            self._decay.resolve(run.total_steps, run.steps_per_epoch, run.is_trial)

    def start(self, run: Coordinator) -> None:
        """See `CompressionCallback.start`."""
        if self._decay is not None:
            decisions = run.decisions.of(self.name)
            self._decay.resolve(run.total_steps, run.steps_per_epoch, run.is_trial, decisions)
            if any(group.get("weight_decay") for o in run.trainer.optimizers for group in o.param_groups):
                rank_zero_info(
                    f"{self.name}: the optimizer decays the factors too, besides frobenius_decay of their products; "
                    "give it weight_decay=0 to decay only these"
                )
        if self.rewarm is not None:
            at = run.resolve(Schedule(begin=self.rewarm, curve="constant")).events[0]
            self._rewarm_steps = max(1, at)
            warming = Rewarming(lambda: self._warmth(run))
            self._handles = [handle for o in run.trainer.optimizers for handle in warming.install(o)]
        scaled = self.when == "auto" or self.settings.rule == "stable"
        if scaled and not self.at_start and run.decisions.find(f"{self.name}/initial") is None:
            run.decisions.record(run.step, f"{self.name}/initial", Work(self, run).scales())

    def event(self, run: Coordinator, step: int) -> None:
        """Switch, or see whether the ranks have settled."""
        assert self.resolved is not None
        decisions = run.decisions.of(self.name)
        if decisions.find("switch") is not None:
            return
        reason = "schedule"
        if self.when == "auto":
            run.decisions.record(step, f"{self.name}/stable_ranks", Work(self, run).estimates())
            history = [record.outcome for record in run.decisions.of(self.name).all("stable_ranks")]
            due = self.resolved.due(step, self.done, decisions)
            last = self.resolved.events[-1] in due
            settled = has_converged(history, self.window, self.tolerance) if history[-1] else False
            if not settled and not last:
                return
            reason = "settled" if settled else "the last event"
            known = {*self.done, *due}
            self.done += [event for event in self.resolved.events if event not in known]  # there is nothing left to do
        work = Work(self, run)
        work.mask(step, reason) if self.mode == "masked" else work.replace(step, reason)
        if self._decay is not None:
            self._decay.forget()

    def taken_back(self, run: Coordinator) -> None:
        """The layers are those from before the switch."""
        if self._decay is not None:
            self._decay.forget()

    def boundary(self, run: Coordinator, step: int) -> None:
        """Refuse in the first step what cannot work, now that all schedules are resolved."""
        if self._checked or self.resolved is None or run.decisions.find(f"{self.name}/switch") is not None:
            return
        self._checked = True
        rehearsed = run.decisions.find(f"{self.name}/latency") or run.decisions.find(f"{self.name}/rehearsed")
        if self.settings.budget and rehearsed is None:
            Work(self, run).rehearse(step)
        if self.mode == "masked":
            self._check_quantizers(run)

    def _check_quantizers(self, run: Coordinator) -> None:
        """Quantizers must not have seen activations of factors that will change."""
        assert self.resolved is not None
        for other in run.techniques:
            late = other.resolved is not None and other.resolved.events[0] <= self.resolved.events[-1]
            if type(other).__name__ == "QuantizationAwareTraining" and late:
                raise CompressionError(
                    f"{other.name} begins before {self.name} has chosen its ranks (at the latest at step "
                    f"{self.resolved.events[-1]}), which changes what its quantizers see; let it begin later"
                )

    def finish(self, run: Coordinator) -> None:
        """Cut what is zero away, where shapes may change; say so if there was no switch."""
        if not self.at_start and self._switch(run) is None:
            rank_zero_info(f"{self.name}: the fit ended without a switch; no layer has a lower rank")
        if self.mode == "masked" and self.compact:
            Work(self, run).end_masked()

    def close(self, run: Coordinator) -> None:
        """See `CompressionCallback.close`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        interrupted = str(getattr(run.trainer.state.status, "value", run.trainer.state.status)) == "interrupted"
        ended = run.stage == "fit" and run.materialized and not run._started and not interrupted
        if self.mode == "masked" and self.compact and ended:
            Work(self, run).end_masked()  # resumed from the file of a fit's very end: Lightning calls no `on_train_end`

    def _switch(self, run: Coordinator) -> Decision | None:
        """The record of the switch; none if it was taken back."""
        rejected = run.decisions.find(f"{self.name}/reject")
        return run.decisions.find(f"{self.name}/switch") if rejected is None else None

    def _warmth(self, run: Coordinator) -> float:
        """The factor of the learning rate, a function of the step and the recorded switch."""
        switch = self._switch(run)
        if switch is None or run.step < switch.step or run.step >= switch.step + self._rewarm_steps:
            return 1.0
        return COLD + (1 - COLD) * (run.step - switch.step + 1) / (self._rewarm_steps + 1)


def _schedule(schedule: Any, when: str) -> Schedule | None:
    if isinstance(schedule, str):
        if schedule != "setup":
            raise ValueError(f"schedule is a Schedule or 'setup'; got {schedule!r}")
        return None
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f'schedule is a Schedule, such as Schedule(begin="30%"), or "setup"; got {schedule!r}')
    if when == "auto":
        return replace(schedule or _AUTO, curve="linear")
    return replace(schedule or _AT, end=None, curve="constant")


def _settings(
    rank: Any, energy: float, ratio: float, budgets: Mapping[str, float | None], min_gain: float, multiple_of: int,
    probe: bool,
) -> Settings:  # fmt: skip
    """Everything about ranks, checked."""
    if isinstance(rank, bool) or not isinstance(rank, (int, str)) or (isinstance(rank, int) and rank < 1):
        raise ValueError(f"rank is a whole number, at least 1, or the name of a rule; got {rank!r}")
    if isinstance(rank, str) and rank not in _RULES:
        raise ValueError(f"rank is one of {_RULES} or a whole number; got {rank!r}")
    shares = {"energy": energy, "ratio": ratio, "min_gain": min_gain}
    shares |= {("latency" if k == "latency" else f"keep_{k}"): v for k, v in budgets.items() if v is not None}
    for argument, value in shares.items():
        whole = argument in ("energy", "min_gain")
        if not _is_number(value):
            raise TypeError(f"{argument} is a share, such as 0.5; got {value!r}")
        if not 0 < value <= 1 or (value == 1 and not whole):
            raise ValueError(f"{argument} is a share in (0, 1{']' if whole else ')'}; got {value!r}")
    given: list[Any] = [(what, keep) for what, keep in budgets.items() if keep is not None]
    if len(given) > 1 or (given and rank != "energy"):
        raise ValueError("give one of keep_macs, keep_parameters, latency and rank: a budget chooses the ranks itself")
    common = {"min_gain": min_gain, "multiple_of": multiple_of, "probe": probe}
    if given:
        return Settings(budget=given[0][0], keep=given[0][1], **common)  # type: ignore[arg-type]
    if isinstance(rank, int):
        return Settings("fixed", rank, **common)  # type: ignore[arg-type]
    return Settings(rank, {"ratio": ratio}.get(rank, energy), **common)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
