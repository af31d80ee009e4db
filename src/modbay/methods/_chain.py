"""The permutation symmetries of a chain of layers, read off the chain.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2023 (arXiv 2209.04836),
appendix A.4 of version 1 gives them by hand for others.
"""

from collections.abc import Iterator

from torch import nn

from ..errors import CompositionError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ALIKE = (  # do the same to every unit, whatever its place
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink, nn.Threshold),
)
POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)


def permutation_spec(model: nn.Sequential) -> dict[str, list[tuple[str, int, int]]]:
    """{"P1": [("0.weight", 0, 1), ("0.bias", 0, 1), ("2.weight", 1, 1)], …}: a group a hidden layer, first to last.

        spec = methods.permutation_spec(nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10)))

    Chains, nested or not, of linear maps of vectors (rows, n), convolutions, norms, activations, pooling, dropout and
    Flatten; inputs and outputs keep their places. Norms of units (batch, instance, layer norm of vectors, group norm of
    one group) are moved with them. What has branches, as residual networks, is given by hand:
    `merging.PermutationSpec`. Raises CompositionError for a layer whose symmetry isn't known, named, and for a chain
    without hidden units.
    """
    groups: dict[str, list[tuple[str, int, int]]] = {}
    units, size, form = [], 0, "vectors"  # the axes of the layer before, how many units it has, and where they are
    for name, layer in _layers(model, ""):
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            incoming = layer.weight.shape[1]
            if size:
                block = _block(name, layer, incoming, size, form)
                groups[f"P{len(groups) + 1}"] = [*units, (f"{name}.weight", 1, block)]
            units, size = _owned(name, layer), layer.weight.shape[0]
            form = "maps" if isinstance(layer, CONVOLUTIONS) else "vectors"
        elif size and form == "maps" and isinstance(layer, nn.Flatten):
            if (layer.start_dim, layer.end_dim) != (1, -1):
                raise _unknown(name, layer, f"it flattens from {layer.start_dim} to {layer.end_dim}")
            form = "flattened maps"
        elif size and isinstance(layer, (*BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm)):
            if form == "maps" and isinstance(layer, nn.LayerNorm):
                raise _unknown(name, layer, "it norms places, not units")
            units += _owned(name, layer, size)
        elif size and isinstance(layer, nn.PReLU):
            units += _owned(name, layer, size) if layer.num_parameters > 1 else []
        elif size and not isinstance(layer, (nn.Flatten, *ALIKE, *(POOLS if form == "maps" else ()))):
            raise _unknown(name, layer, f"what it does to the order of units of {form} isn't known")
    if not groups:
        raise CompositionError("permutation_spec: the chain has no hidden units, between two layers with weights.")
    return groups


def _block(name: str, layer: nn.Module, incoming: int, size: int, form: str) -> int:
    """How many places of a layer's input each unit before it has."""
    fits = incoming % size == 0 if form == "flattened maps" else incoming == size
    if not fits or isinstance(layer, CONVOLUTIONS) != (form == "maps"):
        raise _unknown(name, layer, f"it reads {incoming} values of {form} of {size} units")
    return incoming // size


def _layers(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Sequential):
        raise _unknown(prefix or "the model", model, "it is no nn.Sequential, whose order of layers is known")
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential):
            yield from _layers(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _owned(name: str, layer: nn.Module, size: int = 0) -> list[tuple[str, int, int]]:
    """The axis 0 of everything that a layer keeps for each unit; raises where it ties units or places."""
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        raise _unknown(name, layer, f"its {layer.groups} groups tie units to places")
    if isinstance(layer, nn.GroupNorm) and layer.num_groups not in (1, layer.num_channels):
        raise _unknown(name, layer, f"its {layer.num_groups} groups tie units to each other")
    kept = [(key, t) for key, t in layer.state_dict(keep_vars=True).items() if t.ndim]
    wrong = [tuple(t.shape) for _, t in kept if size and t.shape != (size,)]
    if wrong:
        raise _unknown(name, layer, f"it keeps {wrong[0]} for {size} units")
    return [(f"{name}.{key}", 0, 1) for key, _ in kept]


def _unknown(name: str, layer: nn.Module, why: str) -> CompositionError:
    return CompositionError(
        f"permutation_spec: {name.rstrip('.')!r} is {type(layer).__name__}: {why}. Write the spec by hand: "
        f"{{'P1': [('fc1.weight', 0), ('fc1.bias', 0), ('fc2.weight', 1)], …}}."
    )
