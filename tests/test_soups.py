"""Averages of modules for what is new: adapter soups, weights from a few examples, and fusion round by round."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb
from modbay import methods
from modbay.errors import CompositionError


def moved(bay: mb.Bay, scale: float = 0.3) -> mb.Bay:
    """As if its modules had learned."""
    with torch.no_grad():
        for parameter in bay.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return bay


def domains(m: int = 40, d: int = 12) -> dict[str, Tensor]:
    """Texts of four domains, each around a direction of its own."""
    return {
        name: 2 * torch.eye(d)[i] + 0.2 * torch.randn(m, d) for i, name in enumerate(("news", "law", "mail", "tale"))
    }


# AdapterSoup


def test_a_soup_is_of_the_nearest_domains():
    have = domains()
    new = torch.cat([have["law"][:6] * torch.rand(6, 1), have["tale"][:3]]) + 0.1 * torch.randn(9, 12)
    want = {name: F.cosine_similarity(z[:, None], new[None], dim=-1).mean().item() for name, z in have.items()}
    said = methods.similarities(have, new)
    assert list(said) == list(want)
    for name in have:
        assert said[name] == pytest.approx(want[name], abs=1e-6)
    assert methods.adapter_soup(have, new, 1) == {"law": 1.0}
    assert methods.adapter_soup(have, new, 2) == {"law": 0.5, "tale": 0.5}
    assert set(methods.adapter_soup(have, new, 9, least=-1)) == set(have)  # as many as there are
    assert methods.adapter_soup(have, new, 3, least=want["tale"] + 1e-3) == {"law": 1.0}
    assert methods.adapter_soup(have, new, least=1.0) == {}
    assert methods.adapter_soup({name: z.tolist() for name, z in have.items()}, new.tolist(), 1) == {"law": 1.0}
    assert methods.adapter_soup({n: z.bfloat16() for n, z in have.items()}, new.bfloat16(), 1) == {"law": 1.0}


def test_a_soup_takes_any_measure():
    given = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}
    assert methods.adapter_soup(given, torch.zeros(1, 2), by=lambda some, new: {"a": 0.2, "b": 0.1}) == {
        "a": 0.5,
        "b": 0.5,
    }


def test_clusters_tell_whose_a_text_is():
    have = domains()
    new = torch.cat([have["mail"][:6], have["news"][:2]]) + 0.05 * torch.randn(8, 12)
    for n, covariance in ((None, "full"), (None, "diag"), (7, "tied"), (6, "spherical")):
        said = methods.cluster_shares(have, new, n, 5, covariance)
        assert said == {"news": 0.25, "law": 0.0, "mail": 0.75, "tale": 0.0}
    one = methods.cluster_shares(have | {"law": torch.cat([have["law"]] * 2)}, new, 1)
    assert one == {"news": 0.0, "law": 1.0, "mail": 0.0, "tale": 0.0}  # one cluster is of those that are most
    assert methods.cluster_shares(have, new, seed=3) == methods.cluster_shares(have, new, seed=3)


def test_a_soup_by_clusters_is_of_the_domains_of_its_texts():
    have = domains()
    new = torch.cat([have["mail"][:6], have["news"][:2]]) + 0.05 * torch.randn(8, 12)
    assert methods.adapter_soup(have, new, by="clusters") == {"mail": 0.5, "news": 0.5}
    assert methods.adapter_soup(have, new, by="clusters", least=0.3) == {"mail": 1.0}
    tied = functools.partial(methods.cluster_shares, n=7, covariance="tied", dims=5)
    assert methods.adapter_soup(have, new, 1, tied) == {"mail": 1.0}


@pytest.mark.parametrize("kind", [mb.Bottleneck(3), mb.LoRA(2), mb.IA3()], ids=str)
def test_a_soup_averages_parameters(kind):
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(5, 8)
    plain = net(x)
    bay = moved(mb.attach(net, nn.Linear, dict.fromkeys(domains(), kind), aggregator=mb.ParameterAverage()))
    have = domains()
    soup = methods.adapter_soup(have, torch.cat([have["law"], have["tale"]]), 2)
    got = bay.use(soup) and net(x)
    methods.average(bay, "soup", "law", "tale")  # the same, as a module of its own
    assert_close(got, bay.use("soup") and net(x))
    bay.use(methods.adapter_soup(have, have["law"], least=2.0))
    assert_close(net(x), plain, rtol=0, atol=0)  # nothing is near: the base alone


def test_what_soup_can_t_be_made_raises():
    have = domains()
    with pytest.raises(CompositionError, match=r"k=0"):
        methods.adapter_soup(have, have["law"], 0)
    with pytest.raises(CompositionError, match=r"by='cosine'.*'clusters'"):
        methods.adapter_soup(have, have["law"], by="cosine")
    for wrong in (have["law"][0], have["law"][:, :3], have["law"][:0]):
        with pytest.raises(CompositionError, match=r"\(m, d\)"):
            methods.adapter_soup(have, wrong)
    with pytest.raises(CompositionError, match=r"\(m, d\)"):
        methods.similarities({}, have["law"])
    with pytest.raises(CompositionError, match="'law' are not finite"):
        methods.similarities(have | {"law": have["law"] / 0}, have["mail"])
    with pytest.raises(CompositionError, match=r"n=161.*160 texts"):
        methods.cluster_shares(have, have["law"], 161)
