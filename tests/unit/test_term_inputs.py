"""What terms find in what they are given: labels, masks, calls, pairs; and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.distillation.following import EMATeacher, Ensemble, move_towards
from lightning_compress.distillation.losses import BATCH, LOGITS, labels_of
from lightning_compress.distillation.source import TapSource
from lightning_compress.distillation.teachers import Teacher
from lightning_compress.distillation.tokens import ARGUMENTS, token_kl_loss
from lightning_compress.pipeline import StepPipeline
from lightning_compress.terms import TapSpec

S, T = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
IDS = torch.arange(8).view(2, 4)


def value(term: lc.TokenKL, *args, batch=None, **kwargs) -> torch.Tensor:
    return term.compute({LOGITS: [S], ARGUMENTS: [(args, kwargs)], BATCH: [batch]}, {LOGITS: [T]}, 0)


def test_labels_are_found_or_asked_for() -> None:
    y = torch.tensor([1])
    assert labels_of({"x": 0, "y": y}, "y") is labels_of([0, y], 1) is y
    for batch, where, says in [([0], 1, r"no labels at 1 of the batch \(a list\)"), ({"x": y}, "y", r"keys \['x'\]")]:
        with pytest.raises(lc.CompressionError, match=says):
            labels_of(batch, where)
    with pytest.raises(lc.CompressionError, match="is a int, no tensor"):
        labels_of([0, 1], 1)


def test_tokens_that_count_are_those_with_labels_and_attention() -> None:
    labels = torch.tensor([[-100, 2, 3, 4], [-100, -100, 3, 4]])
    attention = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    both = torch.tensor([[True, True, False], [False, True, True]])
    shifted = token_kl_loss(S[:, :-1], T[:, :-1], both)
    assert torch.equal(value(lc.TokenKL(), input_ids=IDS, labels=labels, attention_mask=attention), shifted)
    assert torch.equal(value(lc.TokenKL(), {"input_ids": IDS, "labels": labels, "attention_mask": attention}), shifted)
    only = value(lc.TokenKL(labels="y"), IDS, batch={"y": labels}, attention_mask=attention)
    assert torch.equal(only, shifted)
    assert torch.equal(value(lc.TokenKL(shift=False), IDS), token_kl_loss(S, T))
    square = torch.ones(2, 1, 4, 4)  # says which pairs attend, not which tokens count
    assert torch.equal(value(lc.TokenKL(shift=False), IDS, attention_mask=square), token_kl_loss(S, T))
    assert torch.equal(value(lc.TokenKL(), IDS), token_kl_loss(S[:, :-1], T[:, :-1]))


def test_a_response_of_one_call_only() -> None:
    first, second = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    student, teacher = {TapSpec(): [first, second]}, {TapSpec(): [first, first]}
    assert lc.ResponseKD(call=0).compute(student, teacher, 0).item() == pytest.approx(0, abs=1e-6)
    assert lc.ResponseKD(call=-1).compute(student, teacher, 0).item() > 0.01
    with pytest.raises(lc.CompressionError, match="call 2 of each step, and the student was called 2 times"):
        lc.ResponseKD(call=2).compute(student, teacher, 0)


def test_layers_called_differently_often_are_named() -> None:
    term = lc.AT({"a": "b"})
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(lc.CompressionError, match="'a' 2 and 'b' 1 times"):
        term.compute({TapSpec("a"): [x, x]}, {TapSpec("b"): [x]}, 0)


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: lc.Hint([]), ValueError, "has no layers to compare"),
        (lambda: lc.Hint([3]), TypeError, "names, or a mapping"),
        (lambda: lc.Hint("a", projector="sometimes"), ValueError, "'auto', 'always' or 'never'"),
        (lambda: lc.Hint().taps(), lc.CompressionError, "were not paired yet"),
        (lambda: lc.DKD(alpha=-1), ValueError, "alpha is -1"),
        (lambda: lc.DKD(beta="8"), TypeError, "beta is a number"),
        (lambda: lc.DIST(temperature=0), ValueError, "temperature"),
        (lambda: lc.RKD("a", angle=float("nan")), ValueError, "angle is nan"),
        (lambda: lc.CRD("a", temperature=0), ValueError, "above 0"),
        (lambda: lc.TokenKL(top_k=0), ValueError, "top_k of 'token_kl' is a whole number above 0"),
        (lambda: lc.TokenKL(chunk=2.5), ValueError, "chunk"),
        (lambda: EMATeacher(1.0), ValueError, r"\[0, 1\)"),
        (lambda: EMATeacher("0.9"), TypeError, "number"),
        (lambda: Ensemble([]), ValueError, "one or more"),
        (lambda: Ensemble(["a.ckpt"]), TypeError, "are modules; found str"),
        (lambda: Ensemble([nn.Linear(1, 1)], combine="votes"), ValueError, "'votes'"),
    ],
)
def test_refused(make, kind, says) -> None:
    with pytest.raises(kind, match=says):
        make()


def test_an_average_refuses_what_has_no_partner() -> None:
    with pytest.raises(
        lc.CompressionError, match=r"'weight' of shape \(2, 2\), which in the student has shape \(3, 2\)"
    ):
        move_towards(nn.Linear(2, 2), nn.Linear(2, 3), 0.5)


class Both(lc.LossTerm):
    """Looks at the batch and at the teacher's graph."""

    teacher_graph = True

    def taps(self):
        from lightning_compress.terms import TapSpecs

        return TapSpecs(student=(BATCH, LOGITS), teacher=(TapSpec("0"), LOGITS))

    def compute(self, student, teacher, step):
        self.seen = student[BATCH]
        ((feature,), (answer,)) = (teacher[TapSpec("0")], teacher[LOGITS])
        (self.gradient,) = torch.autograd.grad(answer.sum(), feature)
        return student[LOGITS][0].square().mean()


def test_a_term_sees_the_batch_and_a_graph_of_the_teacher_that_others_do_not() -> None:
    class Lit(nn.Module):
        automatic_optimization = True

        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

        def training_step(self, batch):
            return self.net(batch[0]).sum()

    seen = []

    class Plain(lc.KD):
        def compute(self, student, teacher, step):
            seen.extend(teacher[LOGITS])
            return super().compute(student, teacher, step)

    module, part = Lit(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    both, pipeline = Both(name="both"), StepPipeline(lambda: 0)
    source = TapSource("d", module.net, [both, Plain()], Teacher(part))
    pipeline.add(source)
    pipeline.install(module)
    batch = (torch.randn(5, 3), torch.zeros(5))
    module.training_step(batch).backward()
    assert both.seen[0] is batch
    assert both.gradient.shape == (5, 4)
    assert not seen[0].requires_grad
    assert all(p.grad is None and not p.requires_grad for p in part.parameters())
    assert source.batch is None  # nothing holds the batch afterwards
    pipeline.uninstall()
    assert not part[0]._forward_hooks
