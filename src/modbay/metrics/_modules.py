"""Modules that are attached, as numbers: how large their updates are, and how alike.

Cosines of updates, not of factors: A and B of a low-rank update are only known up to an invertible matrix between them
(Hu et al., "LoRA", 2021, arXiv 2106.09685; Ilharco et al., "Editing Models with Task Arithmetic", 2023, 2212.04089).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..abstract import Delta, ParameterComposition
from ..attach import Bay
from ..core import Part
from ..deltas import Bias, LowRank, Sum
from ..modules import Full
from ..seams import Place

Pieces = dict[str, list[tuple[int, LowRank | Tensor]]]  # of one site: by what is changed, (module, change)


def similarity(bay: Bay) -> dict[str, Any]:
    """The cosines between modules: {bay, of, modules, cosine (n, n)}.

    of: "deltas", ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖) over all sites, where every module changes the weights or is a copy of
    them; else "parameters", of the parameters themselves, in a row. A module that changes nothing has the cosine 0 to
    all others; so have modules that share no site and no shape.
    """
    of, gram = _gram(bay)
    norm = gram.diagonal().clamp(min=0).sqrt()
    cosine = gram / (norm[:, None] * norm).clamp(min=torch.finfo(gram.dtype).tiny)
    cosine = cosine.clamp(-1, 1).fill_diagonal_(1.0)
    return {"bay": bay.state.name, "of": of, "modules": bay.names(), "cosine": cosine.tolist()}


def norms(bay: Bay) -> dict[str, float]:
    """The Frobenius norm of each module's update over all sites; of its parameters, where `similarity` is of these."""
    return dict(zip(bay.names(), _gram(bay)[1].diagonal().clamp(min=0).sqrt().tolist(), strict=True))


def parameters(bay: Bay) -> list[dict[str, Any]]:
    """A row a module: {bay, module, kind, sites, parameters, learning, norm}."""
    rows, size = [], norms(bay)
    for i, name in enumerate(bay.names()):
        parts = [part for m in bay.modulars.values() if (part := m.order[i]) is not None]
        own = bay.parameters(name)
        rows.append(
            {
                "bay": bay.state.name,
                "module": name,
                "kind": " + ".join(dict.fromkeys(repr(part.kind) for part in parts)),
                "sites": len(parts),
                "parameters": sum(p.numel() for p in own),
                "learning": sum(p.numel() for p in own if p.requires_grad),
                "norm": size[name],
            }
        )
    return rows


@torch.no_grad()
def _gram(bay: Bay) -> tuple[str, Tensor]:
    """(what of, the inner products of all pairs of modules (n, n), in float64 on the host)."""
    of = "deltas" if all(_changes(part) for _, parts in _sites(bay) for _, part in parts) else "parameters"
    n = len(bay.names())
    gram = torch.zeros(n, n, dtype=torch.float64)
    for place, parts in _sites(bay):
        pieces: Pieces = {}
        for i, part in parts:
            for what, piece in _update(part, place) if of == "deltas" else _own(part):
                pieces.setdefault(what, []).append((i, piece))
        for several in pieces.values():
            for owners, product in _products(several, place):
                where = torch.tensor(owners)
                gram.index_put_((where[:, None], where), product.to("cpu", torch.float64), accumulate=True)
    return of, gram


def _sites(bay: Bay) -> Iterator[tuple[Place, list[tuple[int, Part]]]]:
    for name, modular in bay.modulars.items():
        parts = [(i, part) for i, part in enumerate(modular.order) if part is not None]
        yield bay.fitting.places[name], parts


def _changes(part: Part) -> bool:
    return isinstance(part.kind, (ParameterComposition, Full))


def _own(part: Part) -> Iterator[tuple[str, Tensor]]:
    for name, p in part.named_parameters():
        yield f"{name} {tuple(p.shape)}", p.float()


def _update(part: Part, place: Place) -> Iterator[tuple[str, LowRank | Tensor]]:
    """What a module changes at a site: (weight, bias or a block's parameter; the change), no narrower than float32."""
    if isinstance(part.kind, Full):
        for name, tensor in part.tensors().items():
            path, _, last = name.replace("/", ".").rpartition(".")
            base = place.target.get_submodule(path)._parameters[last]
            yield name, _wide(tensor) - _wide(base)  # type: ignore[arg-type]
        return
    site, name = place.view(), place.site.parameter
    params = {key: _wide(tensor) for key, tensor in part.tensors().items()}
    for delta in _leaves(part.kind.delta(params, site)):  # type: ignore[union-attr]
        if isinstance(delta, LowRank):
            yield name, delta
        elif isinstance(delta, Bias):
            yield "bias", delta.bias
        else:
            weight, bias = delta.dense(site)
            yield name, weight
            if bias is not None:
                yield "bias", bias


def _wide(tensor: Tensor) -> Tensor:
    known = tensor.is_floating_point()
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) if known else tensor


def _leaves(delta: Delta) -> Iterable[Delta]:
    return [leaf for part in delta.parts for leaf in _leaves(part)] if isinstance(delta, Sum) else [delta]


def _products(several: list[tuple[int, LowRank | Tensor]], place: Place) -> Iterator[tuple[list[int], Tensor]]:
    """The inner products of changes of one tensor: (whose they are, all pairs).

    Where all are low-rank nothing is made dense: ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂ ⊙ A₁A₂ᵀ), of matrices as small as the ranks.
    """
    lows = [piece for _, piece in several if isinstance(piece, LowRank)]
    owners = [i for i, _ in several]
    if len(lows) < len(several):
        site = place.view()
        dense = [piece.dense(site)[0] if isinstance(piece, LowRank) else piece for _, piece in several]
        flat = torch.stack([tensor.flatten() for tensor in dense])
        yield owners, flat @ flat.mT
        return
    experts = lows[0].b.ndim == 3  # (E, r, i) and (E, o, r); else (r, i, …) and (o, r)
    a = torch.cat([low.a if experts else low.a.flatten(1) for low in lows], -2)
    b = torch.cat([low.b * low.s for low in lows], -1)
    product = (b.mT @ b) * (a @ a.mT)
    ranks = [low.b.shape[-1] for low in lows]
    yield [i for i, r in zip(owners, ranks, strict=True) for _ in range(r)], product.sum(0) if experts else product
