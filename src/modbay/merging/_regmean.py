"""RegMean: linear layers are merged so that they do, on each model's inputs, what each model's layer did.

Jin, Ren, Preoţiuc-Pietro and Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", 2023 (arXiv
2212.09849).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import MergeError, listed
from ..types import System, systems
from ._average import average_tensor
from ._models import State, each, fit, weighing, weighted_sum, wide


@systems(
    System(
        (126,),
        "merging.regmean(models, grams)",
        (
            "tests/test_merging.py::test_the_laws_of_merging",
            "tests/test_merging.py::test_regmean_is_least_squares_on_all_data",
            "tests/test_merging.py::test_regmean_is_fusion_bench_s",
        ),
        "RegMean",
        section="5.1",
    )
)
def regmean(
    models: Sequence[State],
    grams: Sequence[Mapping[str, Tensor]],
    alpha: float = 0.9,
    weights: Sequence[float] | None = None,
    transposed: bool = False,
) -> dict[str, Tensor]:
    """W = Σ_i W_i G_i (Σ_i G_i)⁻¹, of linear layers (out, in), G_i = X_iᵀ X_i of their inputs; the others are averaged.

    grams: one a model, G_i (in, in) by the name of the weight, as `gram` has them, added up over batches: layers named
    here are merged so. With sums and alpha=1 the result is the least squares of all data; divided by the number of
    rows (fusion_bench), each model counts the same.
    alpha: entries of G_i off the diagonal are multiplied by it; 0.9 in the paper, 0.1 for T5 there. weights: G_i counts
    w_i times, and so do tensors that are averaged. transposed: weights are (in, out), GPT-2's Conv1D.
    Where Σ_i G_i has no inverse (inputs that are always zero), the solution nearest to the average is taken, where
    fusion_bench raises. Solved in float64.
    Raises MergeError for models or Grams that do not fit, or weights that are not one a model.
    """
    _fitting(models, grams, transposed)

    def core(name: str, tensors: list[Tensor], _: Tensor | None) -> Tensor:
        if name not in grams[0]:
            return average_tensor(tensors, weights)
        return regmean_tensor(tensors, [g[name] for g in grams], alpha, weights, transposed)

    return each("regmean", models, None, core)


def regmean_tensor(
    tensors: Sequence[Tensor],
    grams: Sequence[Tensor],
    alpha: float = 0.9,
    weights: Sequence[float] | None = None,
    transposed: bool = False,
) -> Tensor:
    """`regmean`, of one linear layer: tensors (out, in), grams (in, in)."""
    given = weighing("regmean", weights, len(tensors), normalise=True)
    ws = [(t if transposed else t.mT).double() for t in tensors]  # (in, out)
    gs = [w * shrink(g.double(), alpha) for w, g in zip(given, grams, strict=True)]
    # W = W̄ + G⁻¹ Σ G_i (W_i − W̄): what models agree on is exact, and what no input reaches stays at the average.
    mean = weighted_sum(ws, given)
    total = torch.stack(gs).sum(0)
    wanted = torch.stack([g @ (w - mean) for g, w in zip(gs, ws, strict=True)]).sum(0)
    factor, failed = torch.linalg.cholesky_ex(total)
    if int(failed):
        step = torch.linalg.pinv(total, hermitian=True) @ wanted
    else:
        step = torch.cholesky_solve(wanted, factor)
    merged = mean + step
    return (merged if transposed else merged.mT).contiguous().to(tensors[0].dtype)


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """α G + (1 − α) diag(G)."""
    return alpha * gram + (1 - alpha) * gram.diagonal().diag()


def gram(x: Tensor) -> Tensor:
    """Xᵀ X of a linear layer's inputs x (…, in), in float32 at least: (in, in). Add them up over batches."""
    rows = x.to(wide(x)).reshape(-1, x.shape[-1])
    return rows.mT @ rows


def _fitting(models: Sequence[State], grams: Sequence[Mapping[str, Tensor]], transposed: bool) -> None:
    """One set of Grams a model, of the same names, each as large as its weight's inputs."""
    fit("regmean", models)
    if len(grams) != len(models):
        raise MergeError(f"regmean(grams=…): there are {len(grams)} for {len(models)} models. Give one a model.")
    strange = [name for name in grams[0] if name not in models[0] or models[0][name].ndim != 2]
    if strange:
        raise MergeError(
            f"regmean: grams[0] has {listed(strange)}, and the models no such matrix. Name each Gram as the weight."
        )
    for i, given in enumerate(grams):
        if set(given) != set(grams[0]):
            odd = sorted(set(given) ^ set(grams[0]))
            raise MergeError(
                f"regmean: only one of grams[{i}] and grams[0] has {listed(odd)}. Give it in all, or none."
            )
        for name, g in given.items():
            inputs = models[0][name].shape[0 if transposed else 1]
            if g.shape != (inputs, inputs):
                raise MergeError(
                    f"regmean: grams[{i}][{name!r}] is {tuple(g.shape)}, and the weight has {inputs} inputs. A Gram is "
                    f"(in, in); weights that are (in, out), GPT-2's, need transposed=True."
                )
