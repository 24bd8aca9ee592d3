"""Teachers are frozen and asked as they are; which part answers is found or asked for."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.distillation.source import TapSource, TeacherRunner
from lightning_compress.distillation.taps import Call
from lightning_compress.distillation.teachers import Teacher, find_student_module, resolve_teacher_module
from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.terms import LossTerm, TapSpec, TapSpecs


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3))


class Lit(L.LightningModule):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch):
        raise NotImplementedError


class WithForward(Lit):
    def forward(self, x):
        return self.net(x)


class Inherits(WithForward):
    pass


def test_is_frozen_whatever_it_was():
    module = net().train()
    teacher = Teacher(module)
    x = torch.randn(5, 4, requires_grad=True)
    before = copy.deepcopy(module.state_dict())
    with torch.enable_grad():
        outputs = [teacher(x), teacher(x)]
    assert torch.equal(*outputs)  # no dropout
    assert not any(output.requires_grad or output.is_inference() for output in outputs)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())  # no statistics
    assert not any(p.requires_grad for p in module.parameters())
    assert module[2].inplace is False


def test_is_no_part_of_the_module_that_holds_it():
    lit = Lit(net=net())
    lit.teacher = Teacher(net())
    assert {name.split(".")[0] for name in lit.state_dict()} == {"net"}
    assert len(list(lit.children())) == 1


@pytest.mark.parametrize("own", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.float64, torch.bfloat16])
def test_is_asked_in_its_own_type(own, asked):
    teacher = Teacher(nn.Linear(4, 3)).to("cpu", own)
    assert teacher(torch.randn(2, 4, dtype=asked)).dtype == own


def test_leaves_integers_alone_and_autocast_as_it_is():
    embed = Teacher(nn.Embedding(5, 4))
    assert embed(torch.tensor([1, 2])).shape == (2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert Teacher(nn.Linear(4, 3))(torch.randn(2, 4)).dtype == torch.bfloat16


def test_on_the_cpu_it_answers_where_it_was_asked():
    teacher = Teacher(net(), placement="cpu").to("meta")
    assert all(p.device.type == "cpu" for p in teacher.module.parameters())
    with pytest.raises(ValueError, match="'disk'"):
        Teacher(net(), placement="disk")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_the_cpu_it_answers_a_gpu():
    teacher = Teacher(net(), placement="cpu").to("cuda")
    x = torch.randn(2, 4)
    with torch.autocast("cuda", torch.bfloat16):
        answer = teacher(x.cuda())
    assert answer.device.type == "cuda"
    assert torch.equal(answer.cpu(), teacher(x))


def test_fingerprint_sees_weights_and_shapes_and_nothing_else():
    teacher = Teacher(net())
    print_ = teacher.fingerprint()
    assert print_ == Teacher(net()).fingerprint() == Teacher(net()).to("cpu", torch.float64).fingerprint()
    teacher.module.train()
    assert teacher.fingerprint() == print_
    other = net()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-6
    assert Teacher(other).fingerprint() != print_
    flat = nn.ParameterList([nn.Parameter(torch.zeros(2, 3))])
    assert Teacher(flat).fingerprint() != Teacher(nn.ParameterList([nn.Parameter(torch.zeros(3, 2))])).fingerprint()


def test_student_is_the_module_with_forward_or_its_only_model():
    plain = Lit(net=net(), accuracy=MulticlassAccuracy(3), many=MetricCollection([]), loss=nn.CrossEntropyLoss())
    plain.add_module("_lc_distillation_hint", nn.Linear(2, 2))
    assert find_student_module(plain) == ("net", plain.net)
    for cls in (WithForward, Inherits):
        lit = cls(net=net())
        assert find_student_module(lit) == ("", lit)
        assert find_student_module(lit, "net.0") == ("net.0", lit.net[0])
    compiled = Lit(net=torch.compile(net(), backend="eager"))
    assert find_student_module(compiled) == ("net", compiled.net)


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)}, r"'encoder' \(Linear\), 'head' \(Linear\)"),
        ({"loss": nn.CrossEntropyLoss()}, "found: none"),
        ({"layers": nn.ModuleList([nn.Linear(2, 2)])}, r"'layers' \(ModuleList\)"),
    ],
)
def test_student_that_cannot_be_told_is_asked_for(parts, found):
    with pytest.raises(CompressionError, match=found) as error:
        find_student_module(Lit(**parts))
    assert "student=" in str(error.value)


def test_unknown_student_says_what_is_near():
    with pytest.raises(CompressionError, match=r"'nett'.*'net'"):
        find_student_module(Lit(net=net()), "nett")


def test_the_teachers_part_is_that_of_the_student():
    plain = net()
    assert resolve_teacher_module(plain, "net", Lit(net=net())) is plain
    assert resolve_teacher_module(plain, "0", Lit(net=net())) is plain  # a plain model is the teacher, all of it
    same = Lit(net=net())
    assert resolve_teacher_module(same, "net", Lit(net=net())) is same.net
    other = WithForward(net=net())
    assert resolve_teacher_module(other, "net", Lit(net=net())) is other.net
    assert resolve_teacher_module(other, "model", Lit(model=net())) is other
    assert resolve_teacher_module(other, "", Lit(model=net())) is other
    assert resolve_teacher_module(Lit(big=plain), "model", WithForward(model=net())) is plain
    with pytest.raises(CompressionError, match="'net'"):
        resolve_teacher_module(Lit(model=net()), "net", same)


def test_runner_taps_inner_modules_and_says_if_one_is_not_called():
    teacher = Teacher(nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)}))
    teacher.module.forward = teacher.module["used"].__call__
    runner = TeacherRunner(teacher, ["used", "idle"])
    calls = [Call((torch.ones(2, 4),), {}, None), Call((), {"input": torch.zeros(3, 4)}, None)]
    seen = runner(calls, [TapSpec("used"), TapSpec("used", "input"), TapSpec()])
    assert [value.shape[0] for value in seen[TapSpec("used")]] == [2, 3]
    assert torch.equal(seen[TapSpec("used", "input")][0], torch.ones(2, 4))
    assert torch.equal(seen[TapSpec()][1], seen[TapSpec("used")][1])
    with pytest.raises(CompressionError, match="'idle' was not called"):
        runner(calls, [TapSpec("idle")])
    assert len(runner(calls, [TapSpec("used")])[TapSpec("used")]) == 2  # nothing was left from before
    runner.close()
    assert not teacher.module["used"]._forward_hooks


class Wants(LossTerm):
    def __init__(self, specs: TapSpecs) -> None:
        super().__init__()
        self.specs = specs

    def taps(self):
        return self.specs


def test_source_needs_the_teacher_that_its_terms_want():
    with pytest.raises(CompressionError, match="none was given"):
        TapSource("kd", net(), [Wants(TapSpecs(teacher=(TapSpec(),)))])
    with pytest.raises(ValueError, match=r"a\.b"):
        TapSource("a.b", net(), [])
    with pytest.raises(ValueError, match="task_weight"):
        TapSource("kd", net(), [], task_weight=-1.0)


def test_source_measures_shapes_without_leaving_a_trace():
    student, teacher = net(), Teacher(nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 3)))
    specs = TapSpecs(student=(TapSpec("0"), TapSpec("4", "input")), teacher=(TapSpec("0"), TapSpec()))
    source = TapSource("kd", student, [Wants(specs)], teacher)
    before, call = copy.deepcopy(student.state_dict()), ExampleCall("", (torch.ones(5, 4),))
    shapes = source.measure(lambda: call.run(student))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert shapes.student == {TapSpec("0"): (5, 6), TapSpec("4", "input"): (5, 6)}
    assert shapes.teacher == {TapSpec("0"): (5, 12), TapSpec(): (5, 3)}
    assert source.taps.fired() == []
    with pytest.raises(CompressionError, match="did not call"):
        source.measure(lambda: None)
    source.close()
    assert not student[0]._forward_hooks
