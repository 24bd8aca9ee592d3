"""The wrapped training step against the same thing written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stepping import ByHand, Distil, Gan, Hint, Lit, Manual, NoIndex, Relations, Siamese, fit, mlp, same
from torch import nn

from lightning_compress.distillation.losses import KD
from lightning_compress.distillation.source import TapSource
from lightning_compress.distillation.teachers import Teacher
from lightning_compress.errors import CompressionError
from lightning_compress.pipeline import MANUAL_PATIENCE, StepPipeline
from lightning_compress.schedule import Schedule, Scheduled
from lightning_compress.terms import local_pair

# -- equal to what one would write


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


# -- terms that own modules, and terms with several taps


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


# -- manual optimization


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


# -- gradient terms


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
