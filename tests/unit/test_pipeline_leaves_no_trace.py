"""Where nothing is asked for the pipeline has no effect, and after it nothing is left."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from stepping import ByHand, Distil, Hint, Lit, Manual, NoIndex, fit, hooks_of, mlp, same

from lightning_compress.distillation.losses import KD
from lightning_compress.distillation.source import TapSource
from lightning_compress.distillation.teachers import Teacher
from lightning_compress.errors import CompressionError
from lightning_compress.pipeline import StepPipeline

# -- no effect where none is asked for


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


# -- errors, and taking it all down


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
    pipeline.attach(source, module, source.measure(functools.partial(module.net, torch.zeros(2, 8))))
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
