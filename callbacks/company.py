"""What `MutualDistillation` and `SharedDistillation` share: other networks in the module for the time of a fit."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.callbacks import examples, exchange, interplay
from lightning_compress.callbacks.base import DISTILLATION, CompressionCallback
from lightning_compress.callbacks.scoring import Scoring
from lightning_compress.distillation.company import CompanySource
from lightning_compress.distillation.teachers import find_student_module
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.targets import named_parameters_clean
from lightning_compress.terms import Shapes, non_negative

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.surgery import Follower

Export = Literal["main", "best"]
_COMPRESSING = ("Pruning", "ChannelPruning", "LowRank", "QuantizationAwareTraining")


class Company(CompressionCallback):
    """Base of callbacks that train other networks beside the user's in the same fit.

    Args:
        weight: Factor of what networks learn from each other, >= 0.
        student: Name of the part whose outputs are compared.
        export: Which network the module holds when the fit has ended.
        monitor: What ``"best"`` is judged by; logged in ``validation_step``.
        mode: Whether less or more of it is better.
        seed: Of the other networks' weights.
        name: Tells two instances apart.
    """

    order = DISTILLATION

    def __init__(
        self, weight: float | Scheduled, student: str | None, export: Export, monitor: str | None,
        mode: Literal["min", "max"], seed: int, name: str | None,
    ) -> None:  # fmt: skip
        super().__init__(name)
        if "." in self.name:
            raise ValueError(f"name becomes part of module names, so it has no dots; got {self.name!r}")
        for argument, value, known in (("export", export, ("main", "best")), ("mode", mode, ("min", "max"))):
            if value not in known:
                raise ValueError(f"{argument} is one of {known}; got {value!r}")
        if (export == "best") != (monitor is not None):
            raise ValueError(
                f"export='best' is judged by a value that validation_step logs, and export='main' by none; got "
                f"export={export!r}, monitor={monitor!r} (such as export='best', monitor='val_loss')"
            )
        if student is not None and not isinstance(student, str):
            raise TypeError(f"student is the name of a part of the module, such as 'model'; got {student!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed is a whole number; got {seed!r}")
        non_negative(self.name, "weight", weight)
        self.weight, self.student, self.export, self.monitor = weight, student, export, monitor
        self.mode, self.seed = mode, seed

    # ------------------------------------------------------------------------------------ what the two say themselves
    def make_source(self, run: Coordinator, student: str) -> CompanySource:
        """The source of the pipeline; it makes the helper module when it is attached."""
        raise NotImplementedError

    def pairs(self, source: CompanySource, number: int) -> dict[str, str]:
        """Modules of the helper by name -> modules of the user's that they are like; ``""`` is the user's module."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """How many networks there are besides the student."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ life
    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self._kept: nn.Module | None = None
        self._restored: Mapping[str, Tensor] | None = None
        self._source: CompanySource | None = None
        self._scoring: Scoring | None = None
        self._proved = False

    @property
    def networks(self) -> list[nn.Module]:
        """The other networks, or branches, in their order; empty before a fit."""
        helper: Any = self._kept if self._source is None else self._source.helper
        return [] if helper is None else list(getattr(helper, "branches", helper))

    def needs_unedited_copy(self) -> bool:
        """Copies of the network are made of what the user built, without masks, cuts and quantizers."""
        return self._kept is None

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        run.adapter.require("online distillation", self.name)
        if not run.pl_module.automatic_optimization:
            raise CompressionError(
                f"{self.name}: other networks are trained by `training_step` itself, and a manually optimized one "
                "would also step its optimizers once for each of them. Use automatic optimization, or train a teacher "
                "first and use Distillation"
            )
        if self.export == "best":
            self._check_best(run)

    def _check_best(self, run: Coordinator) -> None:
        run.adapter.require("online distillation, export='best'", self.name)
        inexact = [t.name for t in run.techniques if any(k.__name__ in _COMPRESSING for k in type(t).__mro__)]
        averaging = [n for n in ("WeightAveraging", "StochasticWeightAveraging") if interplay._named(run.trainer, n)]
        if inexact or averaging:
            raise CompressionError(
                f"{self.name}: export='best' may put another network in the place of yours, which "
                f"{(inexact or averaging)[0]} has not {'compressed' if inexact else 'averaged'}; use export='main'"
            )
        if not inspect.isfunction(getattr(type(run.pl_module), "validation_step", None)):
            raise CompressionError(f"{self.name}: export='best' needs a validation_step that logs {self.monitor!r}")

    def attach(self, run: Coordinator) -> None:
        """Put the other networks into the module, before it is wrapped and optimizers are made."""
        student = find_student_module(run.pl_module, self.student)[0]
        source = self.make_source(run, student)
        if self._kept is not None:
            run.pl_module.add_module(source.child, self._kept)  # this Trainer goes on
            self._kept = None
        run.pipeline.add(source)
        run.pipeline.attach(source, run.pl_module, Shapes({}, {}))
        source.watch()
        self._source = source
        if self.export == "best" or self.observes:
            self._scoring = Scoring(self, run, source)

    @property
    def observes(self) -> bool:
        """Whether answers in validation are wanted."""
        return False

    def unedited(self, run: Coordinator) -> Any:
        """A copy of the user's module as it was built, to be used up.

        Raises:
            CompressionError: If it was sharded before one could be made.
        """
        if run.unedited is None:
            raise CompressionError(
                f"{self.name}: the model was sharded in `configure_model` before a copy of it could be made; call "
                "`lightning_compress.materialize(self.model)` right before `fully_shard`"
            )
        return copy.deepcopy(run.unedited)

    def quiet(self, run: Coordinator) -> Callable[[], AbstractContextManager[None]]:
        """Keeps the user's module from logging what other networks do."""
        return lambda: examples.muted(run.pl_module)

    def mirrors(self, run: Coordinator) -> Mapping[str, str]:
        """See `CompressionCallback.mirrors`."""
        source = self._source
        if source is None or source.child not in run.pl_module._modules:
            return {}
        known = {name for name, _ in named_parameters_clean(run.pl_module)}
        found: dict[str, str] = {}
        for number in range(1, self.count + 1):
            for ours, theirs in self.pairs(source, number).items():
                module = run.pl_module.get_submodule(ours)
                for name, _ in named_parameters_clean(module):
                    like = f"{theirs}.{name}" if theirs else name
                    if like in known:
                        found[f"{ours}.{name}"] = like
        return found

    def training_only(self, run: Coordinator) -> Collection[str]:
        """See `CompressionCallback.training_only`."""
        return () if self._source is None else (self._source.child,)

    def followers(self, run: Coordinator) -> Sequence[Follower]:
        """The tap follows modules that are replaced."""
        return [] if self._source is None else [self._source]

    def start(self, run: Coordinator) -> None:
        """Everything is restored."""
        assert self._source is not None
        if self._restored is not None:
            self._fill(self._source.helper)
        if self._scoring is not None:
            if not run.trainer.enable_validation:
                raise CompressionError(
                    f"{self.name}: networks are judged in validation, and this fit has none; pass validation data"
                    + (", or use export='main'" if self.export == "best" else ", or another ensemble")
                )
            self._scoring.install()

    def _fill(self, helper: nn.Module) -> None:
        assert self._restored is not None
        try:
            helper.load_state_dict(self._restored, strict=True)
        except RuntimeError as error:
            raise CompressionError(
                f"{self.name}: the networks in the checkpoint are not those of this callback: {error}. Give the same "
                "peers as before"
            ) from error
        self._restored = None

    def before_optimizer_step(self, run: Coordinator, optimizer: Any) -> None:
        """Once: see that each network is really trained by the user's step."""
        step = run.step
        if self._proved or self._source is None or self._source.term.weight_at(step) == 0:
            return
        self._proved = True
        if not self._source.took_part:
            return  # no loss came of this step
        for number, network in enumerate(self.networks, 1):
            local = [getattr(p.grad, "_local_tensor", p.grad) for p in network.parameters() if p.grad is not None]
            moves = any(bool(grad.count_nonzero()) for grad in local if grad.numel())
            if not (moves or run.adapter.is_sharded):  # a shard may hold nothing of a network
                raise CompressionError(
                    f"{self.name}: network {number} got no gradient, so `training_step` does not use it: it holds the "
                    "model in something else than an attribute of the module (a closure, a list). Call it as "
                    "`self.net(x)`"
                )

    def batch_end(self, run: Coordinator) -> None:
        """Log each term, not weighted."""
        values = {k: v for k, v in run.pipeline.last.items() if k.startswith(f"{self.name}/")}
        if values:
            run.pl_module.log_dict(values)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Decide by what this validation showed."""
        if self._scoring is not None and self._scoring.is_installed and not trainer.sanity_checking:
            self._scoring.end()

    def decide(self, run: Coordinator, products: Tensor) -> None:
        """Networks answered in validation; `products` are of their errors, see `ensembles.error_products`."""

    def finish(self, run: Coordinator) -> None:
        """Put the best network in the student's place."""
        if self.export != "best" or self._source is None:
            return
        latest = run.decisions.find(f"{self.name}/scores")
        if latest is None:
            rank_zero_warn(f"{self.name}: no validation was run, so the student is exported")
            return
        scores = list(latest.outcome)
        chosen = exchange.best_of(scores, self.mode)
        run.decisions.record(run.step, f"{self.name}/export", {"network": chosen, "scores": scores})
        run.share()
        if chosen:
            exchange.exchange(run, self.name, self.pairs(self._source, chosen))
        title = f"network {chosen}" if chosen else "the student"
        rank_zero_info(f"{self.name}: {title} is exported; {self.monitor} of all: {[round(s, 6) for s in scores]}")
        folder = getattr(run.trainer.checkpoint_callback, "dirpath", None)
        if folder:  # whose last file was written before
            path = os.path.join(folder, f"{self.name}.ckpt")
            run.trainer.save_checkpoint(path, weights_only=True)
            rank_zero_info(f"{self.name}: its weights are in {path!r}")

    def close(self, run: Coordinator) -> None:
        """Take the other networks off the module; a checkpoint that is written later has them in this state."""
        if self._scoring is not None:
            self._scoring.remove()
            self._scoring = None
        source, self._source = self._source, None
        if source is not None and not run.adapter.is_sharded:
            self._kept = run.pl_module._modules.pop(source.child, None)

    # ---------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """After the fit also the networks, which are no part of the module any more."""
        state = super().state_dict()
        if self._restored is not None:
            state["networks"] = dict(self._restored)
        elif self._kept is not None:
            state["networks"] = {k: v.detach().clone().cpu() for k, v in self._kept.state_dict().items()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._restored = state_dict.get("networks")
