"""Mixtures of soft prompts: each prompt answers by itself, and the answers are mixed.

Qin and Eisner, "Learning How to Ask: Querying LMs with Mixtures of Soft Prompts", 2021 (arXiv 2104.06599).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import LabelError
from ..losses import marginal_tokens
from ..types import System, systems

TESTS = "tests/test_shared_prompts.py::"


@systems(
    System(
        (143,),
        'methods.prompt_mixture(model, ["a", "b"], weights, **batch)',
        (TESTS + "test_prompts_are_mixed_by_what_they_answer", TESTS + "test_the_mixture_of_prompts_learns"),
        "mixture of soft prompts",
        "p(y | x) = Σ_i p(i) p(y | P_i, x), p(i) = softmax(w)",
        section="5.3",
    )
)
def prompt_mixture(
    model: nn.Module, names: Sequence[str], weights: Tensor, label: str = "prompt", **batch: Any
) -> Tensor:
    """log p(y_t | x, y_<t) = log Σ_i softmax(w)_i p(y_t | P_i, x, y_<t), (b, t, v), of the modules named.

        mb.attach(model, modules=dict.fromkeys("abc", mb.Prompt(5)), name="prompt")
        weights = torch.nn.Parameter(torch.zeros(3))                # of one relation; learned with the prompts
        log_p = methods.prompt_mixture(model, ["a", "b", "c"], weights, **inputs)

    weights: w, (n,) for all rows or (b, n), one a name. label: the keyword by which the prompts' bay is routed, of any
    kind. batch: the call's tensors, a row first; each row runs n times in one batch. Σ_i α_i P_i of the prompts
    themselves is mb.WeightedSum with mb.Fixed(…, learned=True, softmax=True). Left out: the paper's ensembles that also
    weigh a prompt by how well it explains x. Raises LabelError for names or weights that do not fit.
    """
    if isinstance(names, str) or not names or weights.shape[-1] != len(names):
        raise LabelError(f"prompt_mixture({names!r}, weights {tuple(weights.shape)}): names, and a weight for each.")
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    b, n = len(next(iter(tensors.values()), ())), len(names)
    if not b or any(len(value) != b for value in tensors.values()) or (weights.ndim == 2 and len(weights) != b):
        sizes = {key: tuple(value.shape) for key, value in tensors.items()} | {"weights": tuple(weights.shape)}
        raise LabelError(f"prompt_mixture: tensors with a row an example, of which there are several numbers: {sizes}.")
    rows = {key: value.repeat_interleave(n, 0) if key in tensors else value for key, value in batch.items()}
    logits: Tensor = model(**rows, **{label: list(names) * b}).logits
    return marginal_tokens(logits.unflatten(0, (b, n)), weights.float().log_softmax(-1).expand(b, n).to(logits.device))
