"""Token models: steps in the space of embeddings.

Tokens are discrete. A ball around their embeddings holds points that no text has, so what is found here bounds from
below how robust the model is to changes of tokens of that size; it is no attack that someone could mount.

Miyato, Dai, Goodfellow 2017, "Adversarial training methods for semi-supervised text classification",
https://arxiv.org/abs/1605.07725 (perturbed embeddings); the steps are those of PGD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.audits.attacks.goals import Goal
from lightning_compress.audits.attacks.oracle import Oracle
from lightning_compress.audits.attacks.projected import pgd
from lightning_compress.audits.handles import InputSpace, logits_of
from lightning_compress.errors import CompressionError


class EmbeddingView:
    """A token model as a function of the output of its embedding.

    The embedding still runs, on the model's own tokens, and a hook puts other vectors in the place of its output; so
    masks, positions and padding are what the model makes of the tokens. The hook is there only during a call.

    Args:
        model: Takes token ids, alone or in a dict or tuple of tensors with one row for each example.
        inputs: That input, for all N examples.
        embedding: Name of the embedding; `None`: the model's only `nn.Embedding`, or of several the one that gets a
            tensor of the inputs as it is (positions are made inside).
        select: Takes what the model returns and gives logits.

    Raises:
        CompressionError: If no embedding, or more than one, fits.

    Example:
        >>> net = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))
        >>> view = EmbeddingView(net, torch.tensor([[1, 2, 3]]))
        >>> view.vectors.shape, view(view.vectors, rows=torch.tensor([0])).shape
        (torch.Size([1, 3, 4]), torch.Size([1, 2]))
    """

    by_rows = True

    def __init__(
        self, model: nn.Module, inputs: Any, embedding: str | None = None, select: Callable[[Any], Tensor] = logits_of
    ) -> None:
        self.model, self.inputs, self.select = model, inputs, select
        self.name, self.tokens, self.vectors = self._find(embedding)

    def __call__(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Logits where the examples at `rows` (M,) have these embeddings (M, ...)."""
        used: list[bool] = []

        def replace(module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
            if used or output.shape != vectors.shape:  # tied or called again for something else: leave that
                return None
            used.append(True)
            return vectors

        handle = self.model.get_submodule(self.name).register_forward_hook(replace)
        try:
            output = self._run(rows)
        finally:
            handle.remove()
        if not used:
            raise CompressionError(
                f"The embedding {self.name!r} was not called, or gave another shape than for all examples at once."
            )
        return self.select(output)

    def _run(self, rows: Tensor | slice) -> Any:
        if isinstance(self.inputs, Mapping):
            return self.model(**{k: v[rows] if isinstance(v, Tensor) else v for k, v in self.inputs.items()})
        parts = self.inputs if isinstance(self.inputs, tuple | list) else (self.inputs,)
        return self.model(*(p[rows] if isinstance(p, Tensor) else p for p in parts))

    def _find(self, name: str | None) -> tuple[str, Tensor, Tensor]:
        values = self.inputs.values() if isinstance(self.inputs, Mapping) else self.inputs
        given = [v for v in (values if not isinstance(self.inputs, Tensor) else [self.inputs]) if isinstance(v, Tensor)]
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for found, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) if name is None else found == name:

                def note(module: nn.Module, arguments: Any, output: Tensor, found: str = found) -> None:
                    ids = arguments[0]
                    if any(ids is g or (ids.shape == g.shape and torch.equal(ids, g)) for g in given):
                        seen.setdefault(found, (ids.detach().clone(), output.detach().clone()))

                handles.append(module.register_forward_hook(note))
        try:
            with torch.no_grad():
                self._run(slice(None))
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != 1:
            raise CompressionError(
                f"{len(seen)} embeddings take the tokens as they are given ({', '.join(seen) or 'none'}); name one "
                f"with embedding=, and give the tokens as the model's input."
            )
        (found, (ids, vectors)), *_ = seen.items()
        return found, ids, vectors


def embedding_pgd(
    model: nn.Module,
    inputs: Any,
    y: Tensor,
    *,
    eps: float,
    seeds: Tensor,
    norm: str = "linf",
    steps: int = 20,
    fixed: tuple[int, ...] = (),
    embedding: str | None = None,
    select: Callable[[Any], Tensor] = logits_of,
    loss: str | Goal = "scaled_ce",
    batch_size: int = 64,
    restarts: int = 1,
) -> tuple[Tensor, EmbeddingView]:
    """PGD on the embeddings of a token model: a bound, not an attack that someone could mount.

    Args:
        model: Takes token ids; in eval mode, guarded by `guard.audit_context`.
        inputs: Its input for all N examples.
        y: Targets (N, ...).
        eps: Radius, as a share of the root mean square of the embedding's own entries over these tokens: embeddings
            have no unit of their own. For l2 it is that of one token's vector.
        seeds: int64 (N,), one for each example.
        norm: ``"linf"`` or ``"l2"``.
        steps: Of PGD.
        fixed: Token ids whose vectors stay, such as padding and special tokens.
        embedding: Name of the embedding; `None`: the only one that takes the tokens.
        select: Takes what the model returns and gives logits.
        loss: What to climb; `goals.positions()` for token classification.
        batch_size: Most examples in one call.
        restarts: Random starts.

    Returns:
        Embeddings (N, T, D), and the view that gives the model's logits for them.

    Example:
        >>> from lightning_compress.audits.attacks import example_seeds
        >>> net = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))
        >>> tokens = torch.tensor([[1, 2, 0], [3, 4, 5]])
        >>> y, seeds = torch.tensor([0, 1]), example_seeds([0, 1])
        >>> found, view = embedding_pgd(net, tokens, y, eps=0.5, seeds=seeds, fixed=(0,))
        >>> bool((found[0, 2] == view.vectors[0, 2]).all())
        True
    """
    view = EmbeddingView(model, inputs, embedding, select)
    free = ~torch.isin(view.tokens, torch.tensor(fixed, dtype=view.tokens.dtype, device=view.tokens.device))
    if not bool(free.any()):
        raise CompressionError(f"All tokens are among fixed={fixed}: there is nothing to move.")
    unit = float(view.vectors[free].double().square().mean().sqrt())
    radius = eps * unit * (math.sqrt(view.vectors.shape[-1]) if norm == "l2" else 1.0)
    oracle = Oracle(_Held(view, free), batch_size)
    everywhere = InputSpace(-math.inf, math.inf)
    points = pgd(
        oracle, view.vectors, y, eps=radius, norm=norm, space=everywhere, seeds=seeds, steps=steps, loss=loss,
        restarts=restarts,
    )  # fmt: skip
    return torch.where(free[..., None], points, view.vectors), view


class _Held:
    """A view in which some tokens keep their own vectors, whatever is asked; so no gradient moves them either."""

    by_rows = True

    def __init__(self, view: EmbeddingView, free: Tensor) -> None:
        self.view, self.free = view, free

    def __call__(self, vectors: Tensor, rows: Tensor) -> Tensor:
        return self.view(torch.where(self.free[rows][..., None], vectors, self.view.vectors[rows]), rows)
