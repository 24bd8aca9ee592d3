"""Every network is validated by the user's own ``validation_step``, and scored by what that logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_compress.distillation import ensembles
from lightning_compress.distillation.company import CompanySource
from lightning_compress.distillation.losses import labels_of, rows
from lightning_compress.distillation.peers import reset_metrics
from lightning_compress.distillation.taps import logits_of
from lightning_compress.isolation import isolated_rng
from lightning_compress.pipeline import _Wrapped
from lightning_compress.targets import is_metric
from lightning_compress.terms import TapSpec

if TYPE_CHECKING:
    from lightning_compress.callbacks.company import Company
    from lightning_compress.callbacks.coordinator import Coordinator


class _Score:
    """What one network logged under the monitored name: a mean weighted by samples, or a metric."""

    def __init__(self) -> None:
        self.total = self.samples = 0.0
        self.metric: Any = None

    def note(self, value: Any, samples: int) -> None:
        """One ``self.log``."""
        if isinstance(value, torch.nn.Module) and is_metric(value):
            self.metric = value
            return
        self.total += float(value) * samples
        self.samples += samples


class Scoring:
    """Wraps ``validation_step`` so that the other networks make it too, silently.

    Args:
        owner: The callback.
        run: The coordinator.
        source: Knows the networks.
    """

    def __init__(self, owner: Company, run: Coordinator, source: CompanySource) -> None:
        self.owner, self.run, self.source = owner, run, source
        self._patch: tuple[_Wrapped, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self.scores = [_Score() for _ in range(self.owner.count + 1)]
        self.products: Tensor | None = None
        self.names: set[str] = set()

    @property
    def is_installed(self) -> bool:
        """Whether the module's step is wrapped."""
        return self._patch is not None

    def install(self) -> None:
        """Wrap the module's step; undone by `remove`."""
        module = vars(self.run.pl_module)
        if self._patch is None:
            wrapped = _Wrapped(self.run.pl_module.validation_step, self._step)
            self._patch = wrapped, module.get("validation_step")
            module["validation_step"] = wrapped

    def remove(self) -> None:
        """Put back what was there."""
        if self._patch is not None:
            (wrapped, before), self._patch = self._patch, None
            wrapped.handle = None
            module = vars(self.run.pl_module)
            if module.get("validation_step") is wrapped:
                module.pop("validation_step")
                if before is not None:
                    module["validation_step"] = before

    def _step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.run.trainer.sanity_checking:
            return inner(*args, **kwargs)
        batch = next(iter((*args, *kwargs.values())), None)
        answers = []
        for number in range(1, self.owner.count + 1):
            with isolated_rng(), self.source.as_network(number), self._heard(number, batch, aloud=False):
                answers.append(self._answer(number, lambda: inner(*args, **kwargs))[1])
        with self._heard(0, batch, aloud=True):
            output, own = self._answer(0, lambda: inner(*args, **kwargs))
        if self.owner.observes:
            self._observe(batch, [own, *answers])
        return output

    def _answer(self, number: int, step: Callable[[], Any]) -> tuple[Any, list[Any]]:
        if not self.owner.observes:
            return step(), []
        taps = self.source.taps_of(number)
        try:
            with taps.recording():
                output = step()
            return output, taps.values(TapSpec())
        finally:
            taps.clear()

    @torch.no_grad()
    def _observe(self, batch: Any, answers: list[list[Any]]) -> None:
        term: Any = self.source.term
        for call in zip(*answers, strict=True):
            logits = [logits_of(z) for z in call]
            stacked = torch.stack([rows(z, term.class_dim) for z in logits])
            labels = labels_of(batch, term.labels)
            ensembles.check_classes(labels, logits[0].movedim(term.class_dim, -1).shape[:-1], stacked.shape[-1])
            labels = labels.flatten().long()
            kept = labels != term.ignore_index
            products = ensembles.error_products(stacked[:, kept], labels[kept])
            self.products = products if self.products is None else self.products + products

    @contextmanager
    def _heard(self, number: int, batch: Any, aloud: bool) -> Iterator[None]:
        """Listen to what the user's module logs; let it through only for the student."""
        module = self.run.pl_module
        before = {name: module.__dict__.get(name) for name in ("log", "log_dict")}

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            self.names.add(name)
            if name == self.owner.monitor:
                self.scores[number].note(value, kwargs.get("batch_size") or _samples(batch))
            if aloud:
                type(module).log(module, name, value, *args, **kwargs)

        def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
            for name, value in dictionary.items():
                log(name, value, *args, **kwargs)

        module.__dict__.update(log=log, log_dict=log_dict)
        try:
            yield
        finally:
            for name, value in before.items():
                module.__dict__.pop(name)
                if value is not None:
                    module.__dict__[name] = value

    def end(self) -> None:
        """A validation is over: record the scores and let the owner decide.

        Raises:
            CompressionError: If ``validation_step`` did not log the monitored value.
        """
        run, owner = self.run, self.owner
        if owner.monitor is not None:
            missing = all(score.metric is None and not score.samples for score in self.scores)
            run.adapter.together(
                f"{owner.name}: validation_step did not log {owner.monitor!r}, by which networks are judged; it logged "
                f"{', '.join(sorted(self.names)) or 'nothing'}. Log it there, not at the end of the epoch"
                if missing
                else None
            )
            outcome = [self._value(score) for score in self.scores]
            run.decisions.record(run.step, f"{owner.name}/scores", run.adapter.broadcast(outcome))
        if self.products is not None:
            products = self.products.to(run.adapter.device)
            if run.adapter.world_size > 1:
                dist.all_reduce(products)
            owner.decide(run, products.cpu())
        for network in owner.networks:
            reset_metrics(network)
        self._forget()
        run.share()

    def _value(self, score: _Score) -> float:
        if score.metric is not None:
            return float(score.metric.compute())
        pair = torch.tensor([score.total, score.samples], dtype=torch.float64, device=self.run.adapter.device)
        if self.run.adapter.world_size > 1:
            dist.all_reduce(pair)
        return float(pair[0] / pair[1])


def _samples(batch: Any) -> int:
    return extract_batch_size(batch)
