"""How much quantizing each layer harms, for all layers and choices at once, without training.

The estimate is the Fisher information of layer outputs, as in "Fisher" pruning (Theis et al., 2018) and NVIDIA's
ModelOpt `auto_quantize`: to second order, and with the Fisher matrix in place of the Hessian, changing the outputs of a
layer by ``d`` raises the loss by

    1/2 * mean over samples of (sum over elements of g * d) ** 2

where ``g`` is the gradient of the sample's loss with respect to these outputs. Outputs rather than weights, because
their gradients come apart by sample in an ordinary backward pass, and weights and activations are then measured in the
same unit: ``d`` is what the layer computes with quantized weights and inputs, less what it computes without.
``form="element"`` squares before it sums over elements (ModelOpt's form, the diagonal of the Fisher matrix). It needs
no dimension of samples, but takes rounding errors that act together, such as those of one weight at all positions of an
image, for independent. On small convolutional networks (digits and MNIST, two seeds each, 2 to 8 bits) the rank
correlation with the measured Kullback-Leibler divergence was 0.96 to 0.99 by sample and 0.95 to 0.97 by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.isolation import as_found
from lightning_compress.nested import map_tensors, tensor_leaves
from lightning_compress.quantization.bits.choices import Choice, PerChoice
from lightning_compress.quantization.bits.probing import Probed, calibrate, probed
from lightning_compress.ranks import Ranks
from lightning_compress.transforms import transformed

Method = Literal["fisher", "kl", "weights"]
Form = Literal["sample", "element"]


def sensitivity(
    model: nn.Module,
    layers: Sequence[str],
    options: Mapping[str, Choice],
    batches: Iterable[Any] = (),
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    outputs: Callable[[nn.Module, Any], Tensor] | None = None,
    form: Form = "sample",
    ranks: Ranks | None = None,
) -> PerChoice:
    """Score every layer with every choice; the model, its gradients and all random numbers are as before afterwards.

    What is given decides the method:

    - `loss`: the Fisher estimate of how much the loss rises (see the module), from one forward and backward pass.
    - `outputs`: the Kullback-Leibler divergence of the model's predictions, measured with one layer quantized at a
      time: a forward pass for each layer and choice. Slower, but no approximation: errors as large as those of 2 bits
      are beyond the second order, and a model that fits its data leaves the Fisher estimate little gradient to see.
    - neither: the squared error of the weights relative to the weights; no data, and nothing about activations.

    Static ranges of activations need one more forward pass before that.

    Args:
        model: The model, before any quantizer is attached; in evaluation mode while it is measured.
        layers: Clean names of the layers.
        options: The choices by name.
        batches: What `loss` or `outputs` takes, on the model's device; the first dimension of their first tensor counts
            the samples. Inputs and outputs of all layers are kept for one batch at a time.
        loss: ``loss(model, batch)`` returns the mean loss over the samples, a scalar.
        outputs: ``outputs(model, batch)`` returns logits, shape (samples, ..., classes).
        form: Of the Fisher estimate, see the module.
        ranks: The processes that measure on different batches.

    Returns:
        ``{layer: {name of choice: score}}``, the same on all processes.

    Raises:
        CompressionError: If a layer is missing, of no supported type, quantized already, not called, or without
            influence on the loss; if there are no batches; if activations differ but only weights are compared.

    Example:
        >>> from lightning_compress.quantization.bits.choices import choices
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> found = sensitivity(net, ["0", "2"], choices(["int8", "int2"]), batches,
        ...                     loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
        >>> found["0"]["int8/float"] < found["0"]["int2/float"]
        True
    """
    if loss is not None and outputs is not None:
        raise ValueError("give loss= or outputs=, not both: they measure different things")
    if not options or not layers:
        raise ValueError(f"nothing to measure: {len(layers)} layers and {len(options)} choices")
    ranks = ranks or Ranks()
    batches = list(batches)
    if not batches and (loss is not None or outputs is not None):
        raise CompressionError("there are no batches to measure the sensitivity on")
    with as_found(model), probed(model, layers, options) as probes:
        if loss is None and outputs is None:
            return _weight_errors(probes, options)
        run = loss or outputs
        assert run is not None
        calibrate(model, probes, batches, run, ranks)
        if loss is not None:
            return _Fisher(probes, options, form).measure(model, batches, loss, ranks)
        return _divergences(model, probes, options, batches, run, ranks)


# --------------------------------------------------------------------------------------------------------------- Fisher
class _Tap(torch.autograd.Function):
    """Passes outputs on and hands their gradients to a function, all of them at once."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, receive: Callable[[Sequence[Tensor]], None], *outputs: Tensor) -> Any:
        ctx.receive = receive
        return tuple(output.clone() for output in outputs)  # later in-place operators must not reach the original

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.receive(grads)
        return (None, None, *grads)


class _Fisher:
    def __init__(self, probes: Sequence[Probed], options: Mapping[str, Choice], form: Form) -> None:
        if form not in ("sample", "element"):
            raise ValueError(f"form is 'sample' or 'element'; got {form!r}")
        self.probes, self.options, self.form = probes, options, form
        self.samples = 0
        self.replaying = False
        self.sums: dict[str, Tensor] = {}

    def measure(
        self, model: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor], ranks: Ranks
    ) -> PerChoice:
        """Run all batches and return the scores."""
        total = 0
        with ExitStack() as stack:
            for layer in self.probes:
                hook = layer.module.register_forward_hook(self._hook(layer), with_kwargs=True)
                stack.callback(hook.remove)
            # cuDNN has no backward pass of recurrent layers in evaluation mode.
            recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
            stack.enter_context(torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent))
            for parameter in model.parameters():  # only gradients of activations are wanted
                parameter.requires_grad_(False)
            for batch in batches:
                self.samples = _batch_size(batch)
                total += self.samples
                with torch.enable_grad():
                    value = loss(model, batch)
                    if not isinstance(value, Tensor) or value.numel() != 1:
                        raise CompressionError(f"the loss has to be a scalar tensor; it returned {_shown(value)}")
                    if value.requires_grad:
                        value.backward()  # type: ignore[no-untyped-call]
        self._check_seen()
        names = [layer.name for layer in self.probes]
        return _reduced(names, list(self.options), [self.sums[name] for name in names], total, ranks)

    def _hook(self, layer: Probed) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self.replaying:
                return None
            layer.calls += 1
            with torch.no_grad():
                saved = map_tensors(lambda t: t.detach().clone(), (args, kwargs))
            plain = _floats(output)
            anchor = torch.zeros((), requires_grad=True)
            passed = _Tap.apply(anchor, lambda grads: self._receive(layer, saved, plain, grads), *plain)
            new = {id(old): out for old, out in zip(plain, passed, strict=True)}
            return map_tensors(lambda t: new.get(id(t), t), output)

        return hook

    @torch.no_grad()
    def _receive(self, layer: Probed, saved: Any, plain: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        args, kwargs = saved
        self.replaying = True
        found = []
        for choice in self.options.values():
            layer.use(choice)
            changed = _floats(layer.module.forward(*args, **kwargs))
            parts = [g.float() * (new.float() - old.float()) for g, new, old in zip(grads, changed, plain, strict=True)]
            found.append(self._square(layer, parts))
        layer.use(None)
        self.replaying = False
        # Gradients of a mean over samples are those of each sample's loss, divided by their number.
        new_sums = 0.5 * self.samples**2 * torch.stack(found)
        self.sums[layer.name] = self.sums.get(layer.name, 0) + new_sums

    def _square(self, layer: Probed, parts: Sequence[Tensor]) -> Tensor:
        if self.form == "element":
            return torch.stack([part.square().sum(dtype=torch.float64) for part in parts]).sum()
        by_sample = [self._by_sample(layer, part, first=i == 0) for i, part in enumerate(parts)]
        return torch.stack(by_sample).sum(0).square().sum()

    def _by_sample(self, layer: Probed, part: Tensor, first: bool) -> Tensor:
        """Sums over everything but the samples, float64, shape (samples,)."""
        count, module = self.samples, layer.module
        dims = [dim for dim, size in enumerate(part.shape) if size == count]
        if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and part.dim() == 3:
            swapped = isinstance(module, nn.RNNBase) and not first  # hidden states are never batch first
            dims = [0 if module.batch_first and not swapped else 1]
        if dims and part.shape[dims[0]] == count:
            return part.movedim(dims[0], 0).reshape(count, -1).sum(1, dtype=torch.float64)
        if part.dim() and part.shape[0] % count == 0:  # tokens of all samples, one after the other
            return part.reshape(count, -1).sum(1, dtype=torch.float64)
        raise CompressionError(
            f"{layer.name!r} returns a tensor of shape {tuple(part.shape)}, in which the {count} samples of the batch "
            "cannot be told apart; use form='element'"
        )

    def _check_seen(self) -> None:
        for layer in self.probes:
            if not layer.calls:
                raise CompressionError(f"{layer.name!r} was not called on any batch; leave it out")
            if layer.name not in self.sums:
                raise CompressionError(f"{layer.name!r} has no influence on the loss; leave it out, or use outputs=")


# ------------------------------------------------------------------------------------------------------------ fallbacks
def _divergences(
    model: nn.Module,
    probes: Sequence[Probed],
    options: Mapping[str, Choice],
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Tensor],
    ranks: Ranks,
) -> PerChoice:
    sums = [torch.zeros(len(options), dtype=torch.float64) for _ in probes]
    total = 0
    for batch in batches:
        plain = _log_probabilities(run(model, batch))
        total += len(plain)
        for layer, found in zip(probes, sums, strict=True):
            for index, choice in enumerate(options.values()):
                layer.use(choice)
                changed = _log_probabilities(run(model, batch))
                each = F.kl_div(changed, plain, reduction="none", log_target=True)
                found[index] += float(each.sum() / (each[0, ..., 0].numel() or 1))
            layer.use(None)
    return _reduced([layer.name for layer in probes], list(options), sums, total, ranks)


def _log_probabilities(logits: Any) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[-1] < 2:
        raise CompressionError(
            "outputs= returns logits of shape (samples, ..., classes) with two classes or more; it returned "
            f"{_shown(logits)}. For other models give a loss"
        )
    return F.log_softmax(logits.double(), dim=-1)


def _weight_errors(probes: Sequence[Probed], options: Mapping[str, Choice]) -> PerChoice:
    if len({choice.input for choice in options.values()}) > 1:
        raise CompressionError(
            "without data only weights can be compared, but the choices differ in activations; give batches and a loss="
        )
    found: PerChoice = {}
    for layer in probes:
        found[layer.name] = {}
        for key, choice in options.items():
            layer.use(None)
            plain = [transformed(layer.module, s, getattr(layer.module, s)).double() for s in layer.weights]
            layer.use(choice)
            new = [transformed(layer.module, s, getattr(layer.module, s)).double() for s in layer.weights]
            error = sum(float((a - b).square().sum()) for a, b in zip(new, plain, strict=True))
            norm = sum(float(a.square().sum()) for a in plain)
            found[layer.name][key] = error / norm if norm else 0.0
        layer.use(None)
    return found


# -------------------------------------------------------------------------------------------------------------- helpers
def _reduced(
    layers: Sequence[str], options: Sequence[str], sums: Sequence[Tensor], samples: int, ranks: Ranks
) -> PerChoice:
    flat = torch.stack([s.double().cpu() for s in sums]).flatten()
    flat = ranks.reduce(torch.cat([flat, torch.tensor([float(samples)], dtype=torch.float64)]), "sum")
    means = (flat[:-1] / flat[-1]).view(len(layers), len(options)).tolist()
    return {layer: dict(zip(options, row, strict=True)) for layer, row in zip(layers, means, strict=True)}


def _floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in tensor_leaves(output) if leaf.is_floating_point()]


def _batch_size(batch: Any) -> int:
    for leaf in tensor_leaves(batch):
        if leaf.dim():
            return len(leaf)
    raise CompressionError(f"the samples of a batch cannot be counted: there is no tensor in {_shown(batch)}")


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
