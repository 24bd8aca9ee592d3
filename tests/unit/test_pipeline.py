"""The wrapped training step against the same thing written by hand, and what is left after it: nothing."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.distillation.losses import KD
from lightning_compress.distillation.source import TapSource
from lightning_compress.distillation.teachers import Teacher
from lightning_compress.errors import CompressionError
from lightning_compress.pipeline import MANUAL_PATIENCE, StepPipeline
from lightning_compress.schedule import Schedule, Scheduled
from lightning_compress.terms import LossTerm, TapSpec, TapSpecs, local_pair

# -- the user's code -------------------------------------------------------------------------------


def mlp(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(inplace=True), nn.Linear(width, 3))


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, seed=0)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class NoIndex(Lit):
    def training_step(self, batch):
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1]), "extra": 1}


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


class Siamese(Lit):
    def training_step(self, batch):
        logits = torch.cat([self.net(batch[0]), self.net(batch[0] * 2)])
        return F.cross_entropy(logits, torch.cat([batch[1], batch[1]]))


class ByHand(Lit):
    """What our pipeline must be equal to, with nothing of ours in it."""

    def __init__(self, task_weight: float = 1.0, weight: float = 1.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.numbers = task_weight, weight, temperature
        self.teacher = [mlp(12, seed=1).eval().requires_grad_(False)]

    def kd(self, logits: Tensor, x: Tensor) -> Tensor:
        temperature = self.numbers[2]
        soft = F.log_softmax(self.teacher[0](x).float() / temperature, 1)
        mine = F.log_softmax(logits.float() / temperature, 1)
        return F.kl_div(mine, soft, log_target=True, reduction="batchmean") * temperature**2

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        return self.numbers[0] * F.cross_entropy(logits, batch[1]) + self.numbers[1] * self.kd(logits, batch[0])


# -- what a callback does with the pipeline --------------------------------------------------------


class Distil(L.Callback):
    def __init__(self, terms=None, task_weight=1.0, gradient_terms=(), student="net") -> None:
        self.terms = [KD()] if terms is None else terms
        self.task_weight, self.gradient_terms, self.student = task_weight, gradient_terms, student
        self.teacher = Teacher(mlp(12, seed=1))
        self.asked = 0
        self.teacher.module.register_forward_hook(self.count)
        self.history: list[dict[str, float]] = []

    def count(self, *_: Any) -> None:
        self.asked += 1

    def setup(self, trainer, pl_module, stage):
        self.pipeline = StepPipeline(step_of=lambda: trainer.global_step)
        student = pl_module.get_submodule(self.student)
        self.source = TapSource("d", student, self.terms, self.teacher, self.task_weight)
        for term in (self.source, *self.terms):
            term.resolve(8, 8)
        shapes = self.source.measure(lambda: student(torch.zeros(2, 8)))
        self.owned = self.pipeline.attach(self.source, pl_module, shapes)
        self.asked = 0
        self.pipeline.add(self.source)
        for term in self.gradient_terms:
            self.pipeline.add_gradient_term(term)
        self.pipeline.install(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.pipeline.before_optimizer_step(optimizer=optimizer)

    def on_train_batch_end(self, trainer, pl_module, *_: Any):
        self.history.append({name: value.item() for name, value in self.pipeline.last.items()})
        assert not any(tap._recorder.calls for tap in self.source.taps.taps.values())  # nothing holds the graph

    def on_validation_end(self, trainer, pl_module):
        assert not any(tap._recorder.calls for tap in self.source.taps.taps.values())

    def teardown(self, trainer, pl_module, stage):
        self.pipeline.uninstall()

    def on_exception(self, trainer, pl_module, exception):
        self.pipeline.uninstall()


def fit(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 1, "limit_val_batches": 1, "num_sanity_val_steps": 1, **options},
    )
    trainer.fit(module, loader, loader)
    return {name: value.clone() for name, value in module.net.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


# -- equal to what one would write -----------------------------------------------------------------


AUTOMATIC = [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}]


@pytest.mark.parametrize(
    ("cls", "options"),
    [(cls, options) for cls in (Lit, NoIndex) for options in AUTOMATIC]
    + [(Manual, {}), (Manual, {"precision": "bf16-mixed"})],
    ids=str,
)
def test_equals_the_step_written_by_hand(cls, options):
    by_hand = fit(ByHand(task_weight=0.3, weight=0.7), **options)
    module, callback = cls(), Distil([KD(weight=0.7)], task_weight=0.3)
    assert same(fit(module, callback, **options), by_hand)
    assert callback.history[0].keys() == {"task", "d/kd"}
    assert not same(fit(Lit(), **options), by_hand)


def test_double_precision_is_not_rounded():
    by_hand = ByHand()
    by_hand.teacher[0].double()
    by_hand.kd = lambda logits, x: (  # type: ignore[method-assign]
        F.kl_div(
            F.log_softmax(logits / 4, 1),
            F.log_softmax(by_hand.teacher[0](x) / 4, 1),
            log_target=True,
            reduction="batchmean",
        )
        * 16
    )
    callback = Distil()
    callback.teacher.to("cpu", torch.float64)
    ours, theirs = fit(Lit(), callback, precision="64-true"), fit(by_hand, precision="64-true")
    assert next(iter(ours.values())).dtype == torch.float64
    assert same(ours, theirs)


def test_schedules_follow_the_optimizer_step():
    ramp = Scheduled(0.0, 1.0, Schedule(begin=0, end=4, curve="linear"))
    callback = Distil([KD(weight=ramp)], task_weight=Scheduled(1.0, 0.5, Schedule(begin=0, end=4, curve="linear")))
    fit(Lit(), callback, accumulate_grad_batches=2)
    assert [set(step) for step in callback.history] == [set(), set()] + [{"task", "d/kd"}] * 6
    assert callback.asked == 6  # the teacher is not run while nothing needs it


def test_several_calls_are_averaged():
    class Twice(ByHand):
        def training_step(self, batch):
            one, two = self.net(batch[0]), self.net(batch[0] * 2)
            task = F.cross_entropy(torch.cat([one, two]), torch.cat([batch[1], batch[1]]))
            return task + torch.stack([self.kd(one, batch[0]), self.kd(two, batch[0] * 2)]).mean()

    callback = Distil()
    assert same(fit(Siamese(), callback), fit(Twice()))
    assert callback.asked == 16


def test_the_root_can_be_the_student():
    class Root(Lit):
        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            with torch.no_grad():
                self(batch[0] * 0)  # teaches nothing: left out
            return F.cross_entropy(self(batch[0]), batch[1])

    assert same(fit(Root(), Distil(student="")), fit(ByHand()))


def test_inside_a_compiled_module():
    torch._dynamo.reset()
    expected = fit(Lit(), Distil([KD(), Hint()]))
    module = Lit()
    module.net.compile(backend="eager")
    assert same(fit(module, Distil([KD(), Hint()])), expected)


def test_a_model_that_ran_compiled_before_is_refused_and_not_silently_undistilled():
    torch._dynamo.reset()
    module = Lit()
    module.net = torch.compile(module.net, backend="eager")
    module.net(torch.zeros(8, 8))
    # Without the probe, which would find it at setup.
    pipeline, source = StepPipeline(lambda: 0), TapSource("d", module.net, [Hint()], Teacher(mlp(12, seed=1)))
    pipeline.add(source)
    pipeline.install(module)
    with pytest.raises(CompressionError, match=r"watches '0'.*compiled"):
        module.training_step((torch.zeros(8, 8), torch.zeros(8, dtype=torch.long)), 0)
    pipeline.uninstall()


# -- no effect where none is asked for -------------------------------------------------------------


@pytest.mark.parametrize("cls", [Lit, NoIndex, Manual])
def test_weight_0_is_no_callback_bit_for_bit(cls, rng_untouched):
    with torch.random.fork_rng():
        module, callback = cls(), Distil([KD(weight=0.0), Hint(weight=0.0)])
        weights = fit(module, callback)
        assert same(weights, fit(cls()))
        assert callback.asked == 0
        assert all(step == {} for step in callback.history)


def test_weight_0_returns_the_very_loss():
    module, loss = Lit(), torch.tensor(1.0)
    for output in (loss, {"loss": loss}, None):
        vars(module)["training_step"] = lambda *_: output  # noqa: B023
        pipeline = StepPipeline(lambda: 0)
        pipeline.add(TapSource("d", module.net, [KD(weight=0.0)], Teacher(mlp(12, seed=1))))
        pipeline.install(module)
        assert module.training_step(None, 0) is output
        pipeline.uninstall()


def test_none_skips_the_step_and_dicts_keep_what_they_have():
    module = Lit()
    outputs = [None, {"loss": torch.tensor(2.0), "extra": "x"}]
    vars(module)["training_step"] = lambda x: (module.net(x), outputs.pop(0))[1]
    pipeline = StepPipeline(lambda: 0)
    pipeline.add(TapSource("d", module.net, [KD()], Teacher(mlp(12, seed=1)), task_weight=0.5))
    pipeline.install(module)
    assert module.training_step(torch.ones(2, 8)) is None
    result = module.training_step(torch.ones(2, 8))
    assert result["extra"] == "x"
    assert result["loss"].item() == pytest.approx(1.0 + pipeline.last["d/kd"].item())
    pipeline.uninstall()


# -- terms that own modules, and terms with several taps -------------------------------------------


class Hint(LossTerm):
    """FitNets in ten lines: what a later family has to look like."""

    def __init__(self, weight: float = 1.0, name: str = "hint") -> None:
        super().__init__(weight, name)
        self.at = TapSpec("0")

    def taps(self):
        return TapSpecs(student=(self.at,), teacher=(self.at,))

    def build(self, shapes):
        return nn.Linear(shapes.student[self.at][1], shapes.teacher[self.at][1])

    def compute(self, student, teacher, step):
        pairs = zip(student[self.at], teacher[self.at], strict=True)
        project = self.module or nn.Identity()
        return torch.stack([F.mse_loss(project(s), t) for s, t in pairs]).mean()


class Relations(LossTerm):
    """Compares two taps of one network with the same two of the other."""

    def taps(self):
        both = (TapSpec("0"), TapSpec("2", "input"))
        return TapSpecs(student=both, teacher=both)

    def compute(self, student, teacher, step):
        assert len(student) == len(teacher) == 2
        gram = [[x.flatten(1) @ x.flatten(1).T for (x,) in side.values()] for side in (student, teacher)]
        return sum((F.mse_loss(s, t) for s, t in zip(*gram, strict=True)), torch.zeros(()))


def test_a_projector_is_trained_and_saved_and_the_teacher_is_not():
    module, callback = Lit(), Distil([Hint(), KD(), Relations(name="relations")])
    before = callback.teacher.fingerprint()
    torch.manual_seed(3)
    fit(module, callback)
    assert list(callback.owned) == ["_lc_d_hint"]
    projector = module._lc_d_hint
    torch.manual_seed(3)
    assert projector.weight.shape == (12, 6)
    assert not torch.equal(projector.weight, nn.Linear(6, 12).weight)  # it moved
    assert callback.teacher.fingerprint() == before
    assert {name.split(".")[0] for name in module.state_dict()} == {"net", "_lc_d_hint"}
    hints = [step["d/hint"] for step in callback.history]
    assert hints[-1] < hints[0]
    fit(module, callback)  # a second fit goes on with the same one
    assert module._lc_d_hint is projector


def test_hint_equals_the_step_written_by_hand():
    class HintByHand(ByHand):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.project = nn.Linear(6, 12)

        def training_step(self, batch):
            hidden = self.net[0](batch[0])
            logits = self.net[2](F.relu(hidden))
            with torch.no_grad():
                target = self.teacher[0][0](batch[0])
            return F.cross_entropy(logits, batch[1]) + 0.5 * F.mse_loss(self.project(hidden), target)

    module = Lit()
    by_hand, callback = HintByHand(), Distil([Hint(weight=0.5)])
    torch.manual_seed(3)
    assert same(fit(module, callback), fit(by_hand))
    assert same(module._lc_d_hint.state_dict(), by_hand.project.state_dict())


def test_owned_modules_train_only_while_their_term_counts():
    hint = Hint(weight=Scheduled(1.0, 0.0, Schedule(begin=0, end=4, curve="linear")))
    hint.resolve(8, 8)
    module, pipeline = Lit(), StepPipeline(lambda: 0)
    source = TapSource("d", module.net, [hint, KD()], Teacher(mlp(12, seed=1)))
    pipeline.attach(source, module, source.measure(lambda: module.net(torch.zeros(2, 8))))
    pipeline.add(source)
    pipeline.install(module)
    assert [pipeline.wanted_requires_grad(step) for step in (0, 3, 4)] == [
        {"_lc_d_hint": True},
        {"_lc_d_hint": True},
        {"_lc_d_hint": False},
    ]
    pipeline.uninstall()


def test_two_sources_share_one_wrapper():
    module, pipeline = Lit(), StepPipeline(lambda: 0)
    teacher = Teacher(mlp(12, seed=1))
    for name, weight in (("a", 1.0), ("b", 0.5)):
        pipeline.add(TapSource(name, module.net, [KD(weight=weight)], teacher, task_weight=0.5))
    with pytest.raises(CompressionError, match="name="):
        pipeline.add(TapSource("a", module.net, []))
    with pytest.raises(CompressionError, match="name="):
        pipeline.add(TapSource("c", module.net, [KD(), KD()], teacher))
    pipeline.install(module)
    pipeline.install(module)  # once
    loss = module.training_step((torch.ones(4, 8), torch.zeros(4, dtype=torch.long)), 0)
    last = {name: value.item() for name, value in pipeline.last.items()}
    assert loss.item() == pytest.approx(0.25 * last["task"] + last["a/kd"] + 0.5 * last["b/kd"])
    with pytest.raises(CompressionError, match="one pipeline"):
        StepPipeline(lambda: 0).install(module)
    pipeline.uninstall()
    assert "training_step" not in vars(module)


def test_a_term_must_return_a_scalar():
    class Wrong(Hint):
        def compute(self, student, teacher, step):
            return torch.zeros(2)

    with pytest.raises(ValueError, match=r"'hint' returned a tensor of shape \(2,\)"):
        fit(Lit(), Distil([Wrong()]))


# -- manual optimization ---------------------------------------------------------------------------


class Gan(L.LightningModule):
    """Alternates: the generator is distilled; the discriminator's loss is its own business."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.critic = mlp(6, seed=0), nn.Linear(3, 1)
        self.seen: list[tuple[str, bool]] = []

    def training_step(self, batch):
        generator, critic = self.optimizers()
        self.toggle_optimizer(critic)
        self.backward_and_step("critic", self.critic(self.net(batch[0])).mean(), critic)
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        self.backward_and_step("generator", -self.critic(self.net(batch[0])).mean(), generator)
        self.untoggle_optimizer(generator)

    def backward_and_step(self, who, loss, optimizer):
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    def backward(self, loss, *args, **kwargs):
        self.seen.append(loss.item())
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.01), torch.optim.SGD(self.critic.parameters(), 0.01)


def test_only_the_backward_that_reaches_the_student_gets_terms():
    plain, distilled, callback = Gan(), Gan(), Distil(task_weight=0.5)
    distilled.critic.load_state_dict(plain.critic.state_dict())
    fit(plain, limit_train_batches=1)
    fit(distilled, callback, limit_train_batches=1)
    assert callback.asked == 1
    assert distilled.seen[0] == plain.seen[0]
    step = callback.history[0]
    assert distilled.seen[1] == pytest.approx(0.5 * step["task"] + step["d/kd"])
    assert "manual_backward" not in vars(distilled)
    assert "training_step" not in vars(distilled)


def test_manual_backward_outside_of_a_step_is_left_alone():
    module = Manual()
    pipeline = StepPipeline(lambda: 0)
    pipeline.add(TapSource("d", module.net, [KD()], Teacher(mlp(12, seed=1))))
    pipeline.install(module)
    seen = []
    module.manual_backward.inner = lambda loss: seen.append(loss)
    loss = torch.tensor(1.0)
    module.manual_backward(loss)
    assert seen == [loss]
    assert seen[0] is loss
    pipeline.uninstall()


def test_manual_steps_that_never_call_the_student_are_an_error_after_a_while():
    class Never(Manual):
        def training_step(self, batch):
            self.manual_backward(self.net[2](self.net[0](batch[0])).sum())

    with pytest.raises(CompressionError, match="watches the student itself"):
        fit(Never(), Distil(), max_epochs=1 + MANUAL_PATIENCE // 8)  # 8 batches an epoch


# -- errors, and taking it all down ----------------------------------------------------------------


def test_a_student_that_is_not_called_is_named_with_those_that_are():
    class Around(Lit):
        def training_step(self, batch):
            return F.cross_entropy(self.net.forward(batch[0]), batch[1])

    module = Around()
    with pytest.raises(CompressionError) as error:
        fit(module, Distil([KD(), Hint()]))
    assert "the student itself (Sequential)" in str(error.value)
    assert "did call: '0'" in str(error.value)
    assert "training_step" not in vars(module)
    assert hooks_of(module) == 0


@pytest.mark.parametrize("cls", [Lit, Manual])
def test_an_exception_in_the_step_leaves_nothing_behind(cls):
    class Fails(cls):
        def training_step(self, batch):
            super().training_step(batch, 0) if cls is Lit else super().training_step(batch)
            raise KeyError("boom")

    module, callback = Fails(), Distil()
    with pytest.raises(KeyError, match="boom"):
        fit(module, callback)
    plain = Fails()
    with pytest.raises(KeyError, match="boom"):
        fit(plain)
    assert list(vars(module)) == list(vars(plain))  # Lightning adds some of its own
    assert hooks_of(module) == 0
    callback.pipeline.uninstall()


def test_what_was_on_the_instance_is_put_back():
    module = Lit()
    own = functools.partial(Lit.training_step, module)
    vars(module)["training_step"] = own
    before = dict(vars(module))
    pipeline = StepPipeline(lambda: 0)
    pipeline.install(module)
    pipeline.uninstall()
    pipeline.uninstall()
    assert vars(module) == before
    assert list(vars(module)) == list(before)
    assert module.training_step is own


def test_a_wrapper_put_on_top_keeps_working_after_ours_is_gone():
    module = Lit()
    pipeline = StepPipeline(lambda: 0)
    pipeline.add(TapSource("d", module.net, [KD()], Teacher(mlp(12, seed=1))))
    pipeline.install(module)
    below = module.training_step
    top = lambda *args: below(*args) * 2  # noqa: E731
    module.training_step = top
    pipeline.uninstall()
    assert module.training_step is top
    batch = (torch.ones(4, 8), torch.zeros(4, dtype=torch.long))
    assert torch.equal(module.training_step(batch, 0), Lit.training_step(module, batch, 0) * 2)


def test_lightning_sees_the_users_signature():
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

    for cls, wanted in ((Lit, True), (NoIndex, False)):
        module, pipeline = cls(), StepPipeline(lambda: 0)
        pipeline.install(module)
        assert is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) is wanted
        assert is_overridden("training_step", module)
        pipeline.uninstall()


@pytest.mark.parametrize("cls", [Lit, Manual])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_runs_the_users_own_code_on_its_own_weights(cls, copied):
    module = cls()
    pipeline = StepPipeline(lambda: pytest.fail("the copy runs our code"))
    pipeline.add(TapSource("d", module.net, [KD()], Teacher(mlp(12, seed=1))))
    pipeline.install(module)
    twin = copied(module)
    for name in {"training_step", "manual_backward"} & set(vars(twin)):
        assert getattr(twin, name).__self__ is twin
        assert getattr(twin, name).__func__ is getattr(type(twin), name)
    if cls is Lit:
        batch = (torch.ones(4, 8), torch.zeros(4, dtype=torch.long))
        twin.training_step(batch, 0).backward()
        assert twin.net[0].weight.grad is not None
        assert module.net[0].weight.grad is None
    assert type(module.training_step).__name__ == "_Wrapped"
    again = copied(twin)  # a copy of the copy
    assert again.training_step.__self__ is again
    pipeline.uninstall()


def test_nothing_of_ours_keeps_the_module_alive():
    module, pipeline, terms = Lit(), StepPipeline(lambda: 0), [KD(), Hint()]
    source = TapSource("d", module.net, terms, Teacher(mlp(12, seed=1)))
    pipeline.attach(source, module, source.measure(lambda: module.net(torch.zeros(2, 8))))
    pipeline.add(source)
    pipeline.install(module)
    module.training_step((torch.ones(4, 8), torch.zeros(4, dtype=torch.long)), 0).backward()
    pipeline.uninstall()
    dead = [weakref.ref(module), weakref.ref(module._lc_d_hint)]
    del module, source
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
    assert terms[1].module is None


@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_copies_the_module_in_either_order(first):
    expected = fit(ByHand(), EMAWeightAveraging(decay=0.5))
    callbacks = [Distil(), EMAWeightAveraging(decay=0.5)]
    module = Lit()
    assert same(fit(module, *(callbacks if first else callbacks[::-1])), expected)


# -- gradient terms --------------------------------------------------------------------------------


class Decay:
    """L2 as a gradient term."""

    def __init__(self, order: str, factor: float, log: list[str] | None = None) -> None:
        self.name, self.order, self.factor, self.log = order, order, factor, log if log is not None else []

    def add_(self, parameters, step):
        self.log.append(self.order)
        for parameter in parameters.values():
            pair = local_pair(parameter)
            if pair is not None:
                pair[1].add_(pair[0], alpha=self.factor)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=str)
def test_gradient_terms_equal_weight_decay_of_the_optimizer(options):
    class Decayed(Lit):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=0.1)

    ours = fit(Lit(), Distil([], gradient_terms=[Decay("penalties", 0.1)]), **options)
    assert same(ours, fit(Decayed(), **options))


def test_gradient_terms_run_in_their_own_order_on_the_optimizers_parameters():
    log: list[str] = []
    module, pipeline = Lit(), StepPipeline(lambda: 0)
    for order in ("masks", "scores", "penalties"):
        pipeline.add_gradient_term(Decay(order, 1.0, log))
    with pytest.raises(ValueError, match="'later'"):
        pipeline.add_gradient_term(Decay("later", 1.0))
    pipeline.install(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module.net[2].bias.grad = None
    pipeline.before_optimizer_step(optimizer=torch.optim.SGD(module.net[0].parameters(), 0.1))
    assert log == ["scores", "penalties", "masks"]
    assert torch.allclose(module.net[0].weight.grad, 3 * module.net[0].weight)
    assert not module.net[2].weight.grad.any()
    pipeline.before_optimizer_step({"w": module.net[2].weight})
    assert torch.allclose(module.net[2].weight.grad, 3 * module.net[2].weight)
    pipeline.uninstall()
