"""Ensembles of predictions: distributions are mixed, or their logits averaged (survey section 4.2).

Hansen and Salamon, "Neural Network Ensembles", IEEE PAMI 12, 1990; logits, a product of experts: Hinton, "Training
Products of Experts by Minimizing Contrastive Divergence", Neural Computation 14, 2002.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..errors import CompositionError
from ..types import System

TESTS = "tests/test_outputs.py::"


class Ensemble(Aggregator):
    """y = log Σ_i α_i softmax(m_i(x)), the mixture of what the modules predict; of logits, y = Σ_i α_i m_i(x).

        mb.attach(model, at="classifier", modules={"a": mb.Head(5), "b": mb.Head(5)}, router=mb.Uniform(),
                  aggregator=mb.Ensemble())

    of: "probabilities", where one sure module is enough for a class; or "logits", whose softmax is ∝ Π_i p_i^α_i, where
    each has a veto. m_i(x) (…, classes) is the site's output with module i alone; α, which must not be negative, is
    divided by its sum. y are log-probabilities, or logits.
    A row without any module is f(x), or zeros where f has other classes; one module alone predicts as it does alone.
    Raises CompositionError for an input composition, and for modules of different classes that are to be weighed.
    """

    systems = (
        System(
            (134,), "mb.Ensemble()",
            (TESTS + "test_an_ensemble_mixes_distributions", TESTS + "test_one_of_an_ensemble_predicts_as_alone"),
        ),
        System(
            (134,), 'mb.Ensemble("logits")',
            (TESTS + "test_an_ensemble_of_logits_is_a_product_of_experts",),
            "ensemble of logits", "Σ_i α_i m_i(x), so that p ∝ Π_i p_i^α_i",
        ),
    )  # fmt: skip

    def __init__(self, of: Literal["probabilities", "logits"] = "probabilities"):
        super().__init__()
        if of not in ("probabilities", "logits"):
            raise CompositionError(f'Ensemble(of={of!r}): it is of "probabilities" or of "logits".')
        self.of = of

    def admit(self, kind: Kind, site: Site) -> None:
        if kind.place:
            raise CompositionError(
                f"Ensemble at site {site.name!r}: {type(kind).__name__} has no output of its own. Run the model with "
                f"each prompt and mix what it gives: losses.marginal_tokens."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        ids = modules.active(routing)
        if not ids:
            return f(x) if f is not None else torch.zeros_like(x)
        outputs, y, alpha = _predictions(f, x, modules, routing, ids, c)
        total = alpha.sum(0)
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.of == "logits":
            mixed = (alpha / torch.where(total == 0, 1, total) * wide.masked_fill(alpha == 0, 0.0)).sum(0)
        else:
            mixed = _mixture(wide.log_softmax(modules.site.axis), alpha, total)
        mixed = mixed.to(outputs.dtype)
        there = y if isinstance(y, Tensor) and y.shape == mixed.shape else torch.zeros_like(mixed)
        return torch.where(total == 0, there, mixed)


def _predictions(
    f: Callable | None, x: Tensor, modules: Any, routing: Routing, ids: list[int], c: Context
) -> tuple[Tensor, Any, Tensor]:
    """(m_i(x) (k, …), f(x), α (k, …), with as many axes). In compiled code every module runs on all rows."""
    if routing.axes and routing.index is not None and not torch.compiler.is_compiling():
        outputs, y = _by_slot(f, x, modules, routing, c)
        alpha = (routing.index >= 0).to(torch.float32)
        alpha = alpha if routing.weights is None else alpha * routing.weights
    else:
        y = f(x) if f is not None else None
        each = [modules.output(i, f, x, c, y) for i in ids]
        if len({out.shape for out in each}) > 1:
            said = ", ".join(f"{modules.names[i]!r}: {tuple(out.shape)}" for i, out in zip(ids, each, strict=True))
            raise CompositionError(
                f"Ensemble at site {modules.site.name!r}: what has different classes can't be mixed ({said})."
            )
        outputs, alpha = torch.stack(each), routing.dense(len(modules))[..., ids]
    alpha = alpha.movedim(-1, 0).to(torch.promote_types(outputs.dtype, torch.float32))
    return outputs, y, alpha.view(*alpha.shape, *[1] * (outputs.ndim - alpha.ndim))


def _by_slot(f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> tuple[Tensor, Any]:
    """As modules.outputs; where heads stand instead of f, narrow outputs are filled up, as in a mixed batch."""
    if not modules.facts(routing)[2]:
        return modules.outputs(f, x, routing, c)
    slots = [Routing(index=routing.index[..., k : k + 1]) for k in range(routing.index.shape[-1])]  # type: ignore[index]
    several = [modules.add(f, x, slot, c) for slot in slots]  # as wide as f(x) at least, where a row has no module
    wide = max(out.shape[-1] for out in several)
    y = f(x) if f is not None else None
    fill = lambda out: nn.functional.pad(out, (0, wide - out.shape[-1]), value=float("-inf"))
    return torch.stack([fill(out) for out in several]), y if y is None or y.shape[-1] > wide else fill(y)


def _mixture(log_p: Tensor, alpha: Tensor, total: Tensor) -> Tensor:
    """log Σ_i α_i p_i / Σ_i α_i, −∞ where all are; with a gradient to each α, be it nought."""
    top = log_p.detach().masked_fill(alpha == 0, float("-inf")).amax(0)
    top = torch.where(top.isinf(), 0.0, top)
    share = (alpha * (log_p - top).clamp(max=60.0).exp()).sum(0)  # more than e⁶⁰ of the rest only where α is nought
    never = share == 0
    mixed = top + torch.where(never, 1.0, share).log() - torch.where(total == 0, 1.0, total).log()
    return torch.where(never, float("-inf"), mixed)
