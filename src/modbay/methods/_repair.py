"""What units of a network give, and REPAIR: an interpolated network's units are given back their mean and deviation.

Jordan, Sedghi, Saukh, Entezari and Neyshabur, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair",
2022 (arXiv 2211.08403).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompositionError, listed
from ..merging import interpolated
from ..types import Params, System, systems
from ._swapped import called_with

CHANNELS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)  # their units are on axis 1


def called(model: Callable, batch: Any) -> Any:
    """model(batch), model(*batch) of a tuple or model(**batch) of a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@torch.no_grad()
def activations(
    model: nn.Module,
    sites: Mapping[str, str],
    batches: Iterable[Any],
    state: Params | None = None,
    run: Callable[[Callable, Any], Any] = called,
) -> dict[str, Tensor]:
    """Z (rows, n) of each group: what a module of the network gives, for `merging.match_activations` and `ot_fusion`.

        z = methods.activations(net, {"P1": "0", "P2": "2"}, [x])

    sites: by group, the dotted name of a module; an activation function's gives what it lets through. Units are on the
    last axis, but on axis 1 of convolutions and norms over channels, and of whatever has four axes or more; every place
    of an example is a row. state: runs the network with it instead of its own. Raises CompositionError for a site that
    isn't there or never fired.
    """
    out: dict[str, list[Tensor]] = {group: [] for group in sites}

    def keep(group: str, y: Tensor) -> None:
        out[group].append(y)

    with _watched(model, sites, keep):
        for batch in batches:
            run(called_with(model, state or {}), batch)
    silent = [group for group, several in out.items() if not several]
    if silent:
        raise CompositionError(f"activations: the sites of {listed(silent)} never fired.")
    return {group: torch.cat(several) for group, several in out.items()}


@systems(
    System(
        (120,),
        "methods.repair(model, a, b, 0.5, batches, sites)",
        (
            "tests/test_alignment.py::test_repaired_statistics_are_the_interpolations",
            "tests/test_recipes.py::test_permuted_networks_have_no_barrier",
        ),
        "REPAIR",
        section="5.1",
    )
)
@torch.no_grad()
def repair(
    model: nn.Module,
    a: Params,
    b: Params,
    share: float,
    batches: Iterable[Any],
    sites: Iterable[str],
    run: Callable[[Callable, Any], Any] = called,
) -> dict[str, Tensor]:
    """(1 − λ) θ_a + λ θ_b, each unit rescaled until E[y] = (1 − λ) E[y_a] + λ E[y_b], and so its deviation.

        merging.permuted(b, …) → b
        methods.repair(net.eval(), a, b, 0.5, [x], ["0", "2", "4"])

    share: λ. sites: dotted names of the layers whose outputs, before the activation, are set right: linear maps,
    convolutions and norms, whose weight and bias take the correction in, so that nothing is added. Hidden layers as a
    rule, and where batch norm follows, the norm instead of the layer. Layers are corrected one after the other, each on
    what the corrected ones before it give, so that the statistics over these batches are exact; the paper's code does
    all at once, in batches. Costs a pass for each end and each site, over batches that can be gone through again. The
    model runs in the mode it is in: eval for batch norm and dropout. Raises CompositionError for a site of another
    type, without a weight or a bias, or one that never fired, and for batches that can be gone through only once.
    """
    sites, batches_again = list(sites), iter(batches) is not batches
    wrong = [site for site in sites if not _corrigible(model, site, a)]
    if wrong or not batches_again:
        raise CompositionError(
            f"repair: {listed(wrong)} of no type that takes a scale and a shift of its units: a linear map, a "
            f"convolution or a norm with weight and bias (where batch norm follows a layer without one, name the norm)."
            if wrong
            else f"repair: batches are gone through {len(sites) + 2} times; give a list or a DataLoader, not "
            f"{type(batches).__name__}."
        )
    first, second = (_statistics(model, sites, batches, state, run) for state in (a, b))
    out = interpolated(a, b, share)
    for site in first:  # in the order in which they fire
        mean, deviation = _statistics(model, [site], batches, out, run)[site]
        want = [(1 - share) * x + share * y for x, y in zip(first[site], second[site], strict=True)]
        scale = torch.where(deviation > 0, want[1] / deviation, 1.0)
        weight, bias = out[f"{site}.weight"], out[f"{site}.bias"]
        wide = scale.view(-1, *[1] * (weight.ndim - 1))
        out[f"{site}.weight"] = (weight * wide).to(weight.dtype)
        out[f"{site}.bias"] = (want[0] + (bias - mean) * scale).to(bias.dtype)
    return out


def _corrigible(model: nn.Module, site: str, state: Params) -> bool:
    layer = dict(model.named_modules()).get(site)
    known = isinstance(layer, (nn.Linear, *CHANNELS, nn.LayerNorm)) and not getattr(layer, "transposed", False)
    units = state[f"{site}.weight"].shape[:1] if f"{site}.weight" in state else None
    return known and units is not None and f"{site}.bias" in state and state[f"{site}.bias"].shape == units


def _statistics(
    model: nn.Module, sites: Sequence[str], batches: Iterable[Any], state: Params, run: Callable
) -> dict[str, tuple[Tensor, Tensor]]:
    """(mean, deviation) of each unit (n,) by site, in the order of their firing, in two moments of float64."""
    sums: dict[str, list] = {}

    def add(site: str, y: Tensor) -> None:
        y = y.double()
        if site not in sums:
            sums[site] = [0, torch.zeros_like(y[0]), torch.zeros_like(y[0]), y.mean(0)]
        far = y - sums[site][3]  # from a first guess of the mean, so that the squares don't cancel
        sums[site][0] += len(y)
        sums[site][1] += far.sum(0)
        sums[site][2] += far.square().sum(0)

    with _watched(model, {site: site for site in sites}, add):
        for batch in batches:
            run(called_with(model, state), batch)
    if len(sums) < len(sites):
        raise CompositionError(f"repair: the sites {listed(set(sites) - set(sums))} never fired.")
    out = {}
    for site, (count, total, squares, guess) in sums.items():
        mean = total / count
        out[site] = guess + mean, (squares / count - mean.square()).clamp(min=0).sqrt()
    return out


@contextmanager
def _watched(model: nn.Module, sites: Mapping[str, str], keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Each site's output goes to keep(group, (rows, n)) as it fires."""
    modules = dict(model.named_modules())
    lost = [site for site in sites.values() if site not in modules]
    if lost:
        raise CompositionError(f"sites: the model has no modules {listed(lost)}; model.named_modules() lists them.")

    def hook(group: str) -> Callable:
        def fired(module: nn.Module, _, y: Tensor) -> None:
            channels = y.ndim > 3 or (y.ndim > 2 and isinstance(module, CHANNELS))
            keep(group, (y.movedim(1, -1) if channels else y).flatten(0, -2))

        return fired

    handles = [modules[site].register_forward_hook(hook(group)) for group, site in sites.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
