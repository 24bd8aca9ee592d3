"""Each loss against its formula, written once more as loops over NumPy arrays; gradients; extreme numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import pearsonr
from torch import Tensor

from lightning_compress.distillation.attribution import attribution_loss, attribution_maps
from lightning_compress.distillation.decoupled import dist_loss, dkd_loss
from lightning_compress.distillation.dense import dense_kd_loss, response_kd_loss
from lightning_compress.distillation.features import hint_loss
from lightning_compress.distillation.information import crd_loss, vid_loss
from lightning_compress.distillation.losses import kd_loss
from lightning_compress.distillation.relations import at_loss, pkt_loss, rkd_angle_loss, rkd_distance_loss, sp_loss
from lightning_compress.distillation.tokens import token_kl_loss
from lightning_compress.errors import CompressionError

Array = Any
LABELS = torch.tensor([3, 0, 4, 1, 1, 2])


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


# -- references --------------------------------------------------------------------------------------------------------


def kl(p: Array, q: Array) -> float:
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))


def standardized_kd(s: Array, t: Array) -> float:
    z = [(x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True, ddof=1) + 1e-7) for x in (s, t)]
    return 4 * float(np.mean([kl(softmax(b / 2), softmax(a / 2)) for a, b in zip(*z, strict=True)]))


def dkd(s: Array, t: Array, temperature: float = 4.0, alpha: float = 1.5, beta: float = 8.0) -> float:
    total = 0.0
    for row, other, label in zip(s, t, LABELS.tolist(), strict=True):
        q, p = softmax(row / temperature), softmax(other / temperature)
        rest = [c for c in range(len(q)) if c != label]
        target = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = kl(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
        total += alpha * target + beta * others
    return temperature**2 * total / len(s)


def dist(s: Array, t: Array, temperature: float = 4.0, beta: float = 2.0, gamma: float = 3.0) -> float:
    q, p = softmax(s / temperature, 1), softmax(t / temperature, 1)
    inter = np.mean([1 - pearsonr(a, b)[0] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - pearsonr(a, b)[0] for a, b in zip(q.T, p.T, strict=True)])
    return float(temperature**2 * (beta * inter + gamma * intra))


def at(s: Array, t: Array) -> float:
    def attention(x: Array) -> Array:
        maps = np.stack([[(sample[:, i, j] ** 2).sum() for i in range(3) for j in range(3)] for sample in x])
        return maps / np.linalg.norm(maps, axis=1, keepdims=True)

    return float(((attention(s) - attention(t)) ** 2).mean())


def sp(s: Array, t: Array) -> float:
    def gram(x: Array) -> Array:
        g = np.array([[np.dot(a.ravel(), b.ravel()) for b in x] for a in x])
        return g / np.linalg.norm(g, axis=1, keepdims=True)

    return float(np.linalg.norm(gram(s) - gram(t)) ** 2 / len(s) ** 2)


def huber(a: float, b: float) -> float:
    d = abs(a - b)
    return 0.5 * d * d if d < 1 else d - 0.5


def rkd_distance(s: Array, t: Array) -> float:
    n, d = len(s), []
    for x in (s.reshape(n, -1), t.reshape(n, -1)):
        pairs = {(i, j): np.linalg.norm(x[i] - x[j]) for i in range(n) for j in range(n)}
        mean = np.mean([v for v in pairs.values() if v > 0])
        d.append({k: v / mean for k, v in pairs.items()})
    return float(np.mean([huber(d[0][k], d[1][k]) for k in d[0]]))


def rkd_angle(s: Array, t: Array) -> float:
    def cosine(x: Array, i: int, j: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return 0.0 if norms == 0 else float(a @ b / norms)

    flat = s.reshape(len(s), -1), t.reshape(len(t), -1)
    n = range(len(s))
    return float(np.mean([huber(cosine(flat[0], *k), cosine(flat[1], *k)) for k in np.ndindex(len(n), len(n), len(n))]))


def pkt(s: Array, t: Array) -> float:
    def chances(x: Array) -> Array:
        x = x.reshape(len(x), -1)
        c = np.array([[(1 + a @ b / np.linalg.norm(a) / np.linalg.norm(b)) / 2 for b in x] for a in x])
        return c / c.sum(1, keepdims=True)

    q, p = chances(s), chances(t)
    return float((p * np.log((p + 1e-7) / (q + 1e-7))).mean())


VARIANCE = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)


def vid(s: Array, t: Array) -> float:
    total = 0.0
    for n, c, i, j in np.ndindex(*s.shape):
        v = float(VARIANCE[c])
        # The density of a normal distribution, without its constant.
        total += (t[n, c, i, j] - s[n, c, i, j]) ** 2 / (2 * v) + math.log(math.sqrt(v))
    return total / s.size


def crd(s: Array, t: Array) -> float:
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t)]
    scores = unit[0] @ unit[1].T / 0.1
    return float(np.mean([logsumexp(scores[i]) - scores[i, i] for i in range(len(s))]))


def response(s: Array, t: Array) -> float:
    values = [
        kl(softmax(t[n, c].ravel() / 2), softmax(s[n, c].ravel() / 2)) for n in range(len(s)) for c in range(s.shape[1])
    ]
    return 4 * float(np.mean(values))


MASK = torch.tensor([[True, False, True], [True, True, False]])


def tokens(s: Array, t: Array, k: int | None = None) -> float:
    values = []
    for n, i in np.argwhere(MASK.numpy()):
        q, p = softmax(s[n, i] / 2), softmax(t[n, i] / 2)
        if k is not None:
            chosen = np.argsort(-p)[:k]
            q, p = ([*x[chosen], 1 - x[chosen].sum()] for x in (q, p))
        values.append(kl(p, q))
    return 4 * float(np.mean(values))


PIXELS = torch.arange(6 * 3 * 3).view(6, 3, 3) % 4 != 0


def dense(s: Array, t: Array) -> float:
    where = np.argwhere(PIXELS.numpy())
    return float(np.mean([kl(softmax(t[n, :, i, j]), softmax(s[n, :, i, j])) for n, i, j in where]))


Loss = Callable[[Tensor, Tensor], Tensor]
LOGITS, MAPS, TOKENS, VECTORS = (6, 5), (6, 4, 3, 3), (2, 3, 7), (6, 4)
CASES: dict[str, tuple[Loss, Callable[[Array, Array], float], tuple[int, ...]]] = {
    "kd, standardized": (lambda s, t: kd_loss(s, t, 2.0, standardize=True), standardized_kd, LOGITS),
    "dkd": (lambda s, t: dkd_loss(s, t, LABELS, 4.0, 1.5, 8.0), dkd, LOGITS),
    "dist": (lambda s, t: dist_loss(s, t, 4.0, 2.0, 3.0), dist, LOGITS),
    "hint": (hint_loss, lambda s, t: float(((s - t) ** 2).sum() / s.size), MAPS),
    "at": (at_loss, at, MAPS),
    "sp": (sp_loss, sp, MAPS),
    "rkd, distance": (rkd_distance_loss, rkd_distance, MAPS),
    "rkd, angle": (rkd_angle_loss, rkd_angle, VECTORS),
    "pkt": (pkt_loss, pkt, MAPS),
    "vid": (lambda s, t: vid_loss(s, VARIANCE.to(s.dtype), t), vid, MAPS),
    "crd": (lambda s, t: crd_loss(s, t, 0.1), crd, VECTORS),
    "response": (lambda s, t: response_kd_loss(s, t, 2.0), response, MAPS),
    "dense": (lambda s, t: dense_kd_loss(s, t, PIXELS), dense, MAPS),
    "tokens": (lambda s, t: token_kl_loss(s, t, MASK, 2.0), tokens, TOKENS),
    "tokens, top 3": (lambda s, t: token_kl_loss(s, t, MASK, 2.0, top_k=3), lambda s, t: tokens(s, t, 3), TOKENS),
    "tokens, in chunks": (lambda s, t: token_kl_loss(s, t, MASK, 2.0, chunk=4), tokens, TOKENS),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Loss, Callable[[Array, Array], float], Tensor, Tensor]:
    loss, reference, shape = CASES[request.param]
    return loss, reference, draw(*shape, seed=1, scale=2.0), draw(*shape, seed=2, scale=2.0)


def test_is_its_formula(case) -> None:
    loss, reference, s, t = case
    value = loss(s, t)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(reference(s.numpy(), t.numpy()), rel=1e-9)
    assert loss(s.float(), t.float()).item() == pytest.approx(value.item(), rel=2e-4)


def test_gradients(case) -> None:
    loss, _, s, t = case
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s.requires_grad_(), atol=1e-6)


def test_equal_features_have_the_least_loss_and_no_gradient(case, request) -> None:
    if request.node.callspec.params["case"] in ("crd", "vid"):
        pytest.skip("its least value is not where the two are equal")
    loss, _, _, t = case
    s = t.clone().requires_grad_()
    value = loss(s, t)
    (gradient,) = torch.autograd.grad(value, s)
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert gradient.abs().max().item() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(case, dtype) -> None:
    loss, _, s, t = case
    s, t = s.to(dtype).requires_grad_(), t.to(dtype)
    value = loss(s, t)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(s.detach().double(), t.double()).item(), rel=2e-3)
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["large", "zero", "equal", "one large"])
def test_extreme_numbers_give_finite_losses_and_gradients(case, dtype, kind) -> None:
    loss, _, s, t = case
    s, t = {
        "large": ((s * 1e4).clamp(-6e4, 6e4), (t * 1e4).clamp(-6e4, 6e4)),
        "zero": (s * 0, t),
        "equal": (s[:1].expand_as(s), t),  # samples that the student cannot tell apart
        "one large": (torch.where(s == s.max(), 6e4, s), t),
    }[kind]
    s = s.to(dtype).clone().requires_grad_()
    value = loss(s, t.to(dtype))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()


# -- what the papers say of their losses -------------------------------------------------------------------------------


def test_dkd_is_kd_if_the_parts_are_weighed_as_kd_does() -> None:
    """Equation 7 of the paper: KD = TCKD + (1 - p_t) NCKD, sample by sample."""
    s, t = draw(6, 5, seed=1), draw(6, 5, seed=2)
    for i, label in enumerate(LABELS):
        sure = torch.softmax(t[i] / 4, 0)[label].item()
        row = (s[i : i + 1], t[i : i + 1], LABELS[i : i + 1], 4.0)
        assert dkd_loss(*row, 1.0, 1 - sure).item() == pytest.approx(kd_loss(*row[:2], 4.0).item(), rel=1e-9)


def test_dkd_takes_the_largest_of_soft_labels_and_says_what_it_needs() -> None:
    s, t = draw(6, 5, seed=1), draw(6, 5, seed=2)
    soft = torch.nn.functional.one_hot(LABELS, 5) * 0.7 + 0.06
    assert torch.equal(dkd_loss(s, t, soft), dkd_loss(s, t, LABELS))
    with pytest.raises(CompressionError, match=r"\(B, C\) by labels \(B,\).*labels='teacher'"):
        dkd_loss(s, t, LABELS[:3])


def test_dist_sees_preferences_only() -> None:
    p = torch.softmax(draw(6, 5, seed=1), 1)
    q = 0.5 * p + 0.1  # another scale and shift: the same correlations
    assert dist_loss(q.log(), p.log(), 1.0).item() == pytest.approx(0, abs=1e-9)


def test_standardized_kd_sees_neither_shift_nor_scale() -> None:
    s = draw(6, 5, seed=1)
    assert kd_loss(3 * s + 7, s, 2.0, standardize=True).item() == pytest.approx(0, abs=1e-9)
    assert kd_loss(3 * s + 7, s, 2.0).item() > 0.1


@pytest.mark.parametrize("name", ["at", "sp", "rkd, distance", "rkd, angle", "pkt"])
def test_relations_see_no_scale_and_any_widths(name) -> None:
    loss, _, shape = CASES[name]
    t = draw(*shape, seed=2)
    wide = torch.cat([t, t], 1) * 5
    assert loss(wide, t).item() == pytest.approx(0, abs=1e-12)


def test_top_k_is_a_lower_bound_that_grows_to_the_whole() -> None:
    s, t = draw(4, 9, seed=1, scale=3), draw(4, 9, seed=2, scale=3)
    values = [token_kl_loss(s, t, top_k=k).item() for k in range(1, 10)]
    assert values == sorted(values)
    assert values[-1] == token_kl_loss(s, t).item()
    assert values[-2] == pytest.approx(values[-1], rel=1e-9)  # the tail is one token


def test_masked_tokens_may_hold_anything() -> None:
    s, t = draw(2, 3, 7, seed=1), draw(2, 3, 7, seed=2)
    wanted = token_kl_loss(s, t, MASK)
    s[~MASK], t[~MASK] = math.nan, math.inf
    s.requires_grad_()
    value = token_kl_loss(s, t, MASK)
    value.backward()
    assert torch.equal(value, wanted)
    assert torch.isfinite(s.grad).all()
    nothing = token_kl_loss(s, t, MASK & False)
    nothing.backward()
    assert nothing.item() == 0


def test_chunks_keep_less_in_memory() -> None:
    from lightning_compress.cost import LiveBytes

    peaks, grads = {}, []
    for chunk in (None, 8):
        s, t = draw(256, 400, seed=1).float().requires_grad_(), draw(256, 400, seed=2).float()
        with LiveBytes().track(s, t) as live:
            token_kl_loss(s, t, chunk=chunk).backward()
        peaks[chunk] = live.peak
        grads.append(s.grad)
    size = 256 * 400 * 4
    assert peaks[8] < 4.5 * size < 6 * size < peaks[None]  # logits of both, gradients twice; against whole soft-maxes
    torch.testing.assert_close(*grads)


def test_dense_brings_teacher_and_mask_to_the_students_size() -> None:
    s, t = draw(2, 3, 4, 4, seed=1), draw(2, 3, 8, 8, seed=2)
    small = torch.nn.functional.interpolate(t, [4, 4], mode="bilinear")
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    mask[:, :, 4:] = False
    assert torch.equal(dense_kd_loss(s, t, mask), dense_kd_loss(s, small, mask[:, ::2, ::2]))


# -- attribution -------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.head = torch.nn.Conv2d(2, 4, 3), torch.nn.Linear(4 * 4 * 4, 3)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.conv(x)
        return feature, self.head(feature.tanh().flatten(1))


def test_attribution_maps_are_grad_cam() -> None:
    """The gradient by hand: a linear head on tanh."""
    net, x, classes = Net(0), draw(3, 2, 6, 6), torch.tensor([2, 0, 1])
    feature, logits = net(x)
    (found,) = attribution_maps(logits, [feature], classes, create_graph=False)
    for n, c in enumerate(classes):
        gradient = net.head.weight[c].view(4, 4, 4) * (1 - feature[n].tanh() ** 2)
        weights = gradient.mean((1, 2))
        cam = sum(weights[k] * feature[n, k] for k in range(4)).clamp(min=0)
        torch.testing.assert_close(found[n, 0], cam / cam.norm())


def test_attribution_matching_differentiates_twice() -> None:
    net, x, classes = Net(0), draw(3, 2, 6, 6), torch.tensor([2, 0, 1])
    teacher = Net(1)
    feature, logits = teacher(x)
    wanted = attribution_maps(logits, [feature], classes, False)[0].detach()

    def loss(weight: Tensor) -> Tensor:
        feature = torch.nn.functional.conv2d(x, weight, net.conv.bias)
        (found,) = attribution_maps(net.head(feature.tanh().flatten(1)), [feature], classes, True)
        return attribution_loss(found, wanted)

    assert torch.autograd.gradcheck(loss, net.conv.weight.detach().requires_grad_())


def test_attribution_says_what_it_cannot_differentiate() -> None:
    with pytest.raises(CompressionError, match="Tap a layer through which the output is computed"):
        attribution_maps(
            draw(2, 3).requires_grad_(), [draw(2, 3, 2, 2).requires_grad_()], torch.tensor([0, 1]), create_graph=False
        )
    x = draw(2, 3).requires_grad_()
    with pytest.raises(CompressionError, match="before pooling and flattening"):
        attribution_maps(x * 2, [x], torch.tensor([0, 1]), create_graph=False)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: at_loss(draw(2, 3, 4, 4), draw(2, 3)), "cannot be compared"),
        (lambda: at_loss(draw(2, 3), draw(2, 3)), "fewer than two"),
        (lambda: at_loss(draw(2, 5, 8), draw(2, 6, 8)), "different numbers of tokens"),
        (lambda: sp_loss(draw(2, 3), draw(3, 3)), "2 samples of the student and 3 of the teacher"),
        (lambda: rkd_angle_loss(draw(1, 3), draw(1, 3)), "at least 2 samples"),
        (lambda: crd_loss(draw(2, 3), draw(2, 4)), "CRD compares embeddings"),
        (lambda: response_kd_loss(draw(2, 3, 4, 4), draw(2, 5, 4, 4)), "channel by channel"),
        (lambda: token_kl_loss(draw(2, 3, 7), draw(2, 3, 7), MASK[:, 1:]), "Shifted labels need shift=False"),
        (lambda: token_kl_loss(draw(2, 3, 7), draw(2, 3, 8)), "different shapes"),
    ],
)
def test_refuses_what_cannot_be_compared(call, says) -> None:
    with pytest.raises(CompressionError, match=says):
        call()
