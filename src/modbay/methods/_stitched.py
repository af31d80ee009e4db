"""Task networks side by side, their layers mixed: cross-stitch and sluice networks.

Misra, Shrivastava, Gupta and Hebert, 2016 (arXiv 1604.03539); Ruder, Bingel, Augenstein and Søgaard, 2019 (arXiv
1705.08142).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..aggregation import CrossStitch
from ..core import Modular
from ..errors import CompositionError
from ..losses import orthogonality
from ..routing import Uniform
from ..types import System, systems


class Stitched(nn.Module):
    """h_k = stitch_k(layer_k(h_{k−1})) for all tasks at once; task t's output is h_K, or with `skip` Σ_k β_tk h_k.

    x (b, …), which all tasks get → one output (b, …) a task, by its name. `alphas()` and `betas` may want a learning
    rate of their own: the paper's is 100 to 1000 times that of the layers.
    """

    def __init__(
        self, networks: Mapping[str, Sequence[nn.Module]], subspaces: int, channels: bool, start: float, axis: int,
        features: int | None, skip: bool,
    ):  # fmt: skip
        super().__init__()
        self.tasks, self.subspaces = list(networks), subspaces
        depths = {task: len(layers) for task, layers in networks.items()}
        if len(depths) < 2 or len(set(depths.values())) != 1 or not min(depths.values()):
            raise CompositionError(
                f"networks of {depths} layers: two tasks or more, all with as many layers, are wanted."
            )
        self.levels = nn.ModuleList(
            Modular(
                None, dict(zip(self.tasks, level, strict=True)), Uniform(),
                CrossStitch(len(self.tasks), subspaces, channels, start, axis), features=features,
            )
            for level in zip(*networks.values(), strict=True)
        )  # fmt: skip
        depth = len(self.levels)
        self.betas = nn.Parameter(torch.full((len(self.tasks), depth), 1 / depth)) if skip else None

    def alphas(self) -> list[Tensor]:
        """α of each level."""
        layers: list[Any] = list(self.levels)
        return [level.aggregator.alpha for level in layers]

    def penalty(self) -> Tensor:
        """Σ ‖W_kᵀ W_l‖² over the weights of all layers: how far their subspaces are from orthogonal."""
        layers: list[Any] = list(self.levels)
        weights = [w for level in layers for w in level.parts.parameters() if w.ndim > 1]
        return torch.stack([orthogonality(w, self.subspaces) for w in weights]).sum()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h, every = x.expand(len(self.tasks), *x.shape), []
        for level in self.levels:
            h = level(h)
            every.append(h)
        if self.betas is not None:
            h = torch.einsum("tk,kt...->t...", self.betas, torch.stack(every))
        return dict(zip(self.tasks, h, strict=True))


@systems(
    System(
        (34,),
        'methods.cross_stitch({"pos": [layer, layer2], "ner": [other, other2]})',
        ("tests/test_networks.py::test_a_cross_stitch_network_is_written_out",),
        "cross-stitch network",
    )
)
def cross_stitch(
    networks: Mapping[str, Sequence[nn.Module]], start: float = 0.9, channels: bool = False, axis: int = -1,
    features: int | None = None,
) -> Stitched:  # fmt: skip
    """x̃_A = α_AA x_A + α_AB x_B after each layer of two or more networks of one shape, one network a task.

    networks: the layers by task. start: of α_AA. channels: α of its own for each of the `features` on `axis`.
    Raises CompositionError for networks of different depths.
    """
    return Stitched(networks, 1, channels, start, axis, features, skip=False)


@systems(
    System(
        (35,),
        'methods.sluice({"pos": [layer, layer2], "ner": [other, other2]})',
        ("tests/test_networks.py::test_a_sluice_network_is_written_out",),
        "sluice network",
    )
)
def sluice(networks: Mapping[str, Sequence[nn.Module]], subspaces: int = 2, axis: int = -1) -> Stitched:
    """α (T·S, T·S) mixes S subspaces of T tasks after each layer, and Σ_k β_tk h_k is task t's output.

    α starts at 1/(T·S), β at one over the number of layers, which must all have one width (the authors' balanced
    start). Add `penalty()`, times a coefficient, to the loss: ‖W_1ᵀ W_2‖² of each layer's weight, where the authors
    take the input and recurrent weights of an LSTM's gate. Raises CompositionError for networks of different depths.
    """
    return Stitched(networks, subspaces, False, 1 / (len(networks) * subspaces), axis, None, skip=True)
