"""Does it fit? Systems that pull the contracts in every direction, in at most 20 lines each.

None of them is a method of the library: each shows that a whole family can be written over the public names.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import modbay as mb


def mlp(d: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))


def randomise(parameters) -> None:
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)


# Factors shared across sites: VeRA (A and B drawn once, frozen; a scale of each site's own).


@dataclass(frozen=True)
class SharedFactors(mb.ParameterComposition):
    constants: ClassVar[tuple[str, ...]] = ("A", "B")
    rank: int = 4

    def init(self, sites):
        a, b = torch.randn(self.rank, sites[0].inputs), torch.randn(sites[0].outputs, self.rank)
        return {s.name: {"A": a, "B": b, "d": torch.full((self.rank,), 0.1), "b": s.zeros(s.outputs)} for s in sites}

    def delta(self, params, site):
        a, b = params["A"] * params["d"].unsqueeze(-1), params["B"] * params["b"].unsqueeze(-1)
        return mb.LowRank(a, b)


def test_factors_shared_across_sites():
    model, x = mlp(), torch.randn(4, 8)
    bay = mb.attach(model, [nn.Linear], {"en": SharedFactors(), "de": SharedFactors()}, name="language")
    first, last = (modular.parts._modules["en"] for modular in bay.modulars.values())
    assert first.A is last.A and first.b is not last.b and len(bay.parameters("en")) == 4
    randomise(bay.parameters())
    mixed = model(x, language=["en", "de", None, "en"])
    alone = [model(x[i : i + 1], language=[label]) for i, label in enumerate(["en", "de", None, "en"])]
    torch.testing.assert_close(mixed, torch.cat(alone))


# Parameters generated per example, from the example itself.


@dataclass(frozen=True)
class FromInput(mb.Generator):
    kind: mb.Kind

    def init(self, sites):
        inner = self.kind.init(sites)
        return {s.name: {k: torch.randn(v.numel(), s.inputs) for k, v in inner[s.name].items()} for s in sites}

    def generate(self, params, x, c):
        shapes = {"A": (2, -1), "B": (-1, 2)}
        return {name: (x @ weight.mT).unflatten(-1, shapes[name]) for name, weight in params.items()}


def test_parameters_generated_per_example():
    layer = mb.Modular(nn.Linear(8, 6), {"g": FromInput(mb.LoRA(2))}, mb.ByLabel("task"), mb.WeightedSum())
    x = torch.randn(3, 8)
    y = layer(x, task=["g", None, "g"])
    a, b = (
        (x[0] @ w.mT).view(s) for w, s in zip(layer.parts._modules["g"].parameters(), [(2, -1), (-1, 2)], strict=True)
    )
    torch.testing.assert_close(y[0], layer.f(x[0]) + b @ a @ x[0])
    torch.testing.assert_close(y[1], layer.f(x[1]))


# Feedback: a Routing that learns from a reward (REINFORCE).


class Sampled(mb.Router):
    def build(self, names, site):
        self.logits = nn.Parameter(torch.zeros(len(names)))

    def forward(self, x, c):
        policy = torch.distributions.Categorical(logits=self.logits.expand(len(x), -1))
        choice = policy.sample()
        return mb.Routing(index=choice.unsqueeze(-1), log_prob=policy.log_prob(choice))


def test_feedback_from_a_reward():
    model = mlp()
    bay = mb.attach(model, "0", {"good": mb.LoRA(2), "bad": mb.LoRA(2)}, Sampled())
    optimiser = torch.optim.Adam(bay.state.router.parameters(), lr=0.1)
    for _ in range(50):
        model(torch.randn(16, 8))
        reward = (bay.routing().index[:, 0] == 0).float()
        loss = -((reward - reward.mean()) * bay.routing().log_prob).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert bay.state.router.logits.softmax(0)[0] > 0.9


# An aggregator that asks the router again, until it says halt: recursion (routing networks, CRL).


class Recursion(mb.Aggregator):
    def forward(self, f, x, modules, routing, c):
        for _ in range(8):
            x = modules.add(None, x, routing, c)
            routing = modules.route(x, c)
            if not modules.active(routing):
                return x
        return x


class UntilLarge(mb.Router):
    def forward(self, x, c):
        halt = bool(x.norm() > 100)
        return mb.Routing(index=torch.zeros(0 if halt else 1, dtype=torch.long), host=(() if halt else (0,),))


def test_an_aggregator_asks_the_router_again():
    double = nn.Linear(4, 4, bias=False)
    double.weight.data = 2 * torch.eye(4)
    loop = mb.Modular(None, {"double": double}, UntilLarge(), Recursion(), features=4)
    torch.testing.assert_close(loop(torch.ones(1, 4)), torch.full((1, 4), 64.0))  # ‖x‖ = 128 > 100 after six


# A route for the whole path: one sampled, one evolved (PathNet), one entry a site.


class Path(mb.Router):
    def forward(self, x, c):
        genotype = self.genotype if hasattr(self, "genotype") else torch.randint(len(self.names), (len(self.sites), 1))
        return mb.Routing(index=genotype, sites=self.sites)


def test_a_route_for_the_whole_path():
    model, x, path = mlp(), torch.randn(64, 8), Path()
    bay = mb.attach(model, [nn.Linear], {str(i): mb.LoRA(2) for i in range(4)}, path)
    randomise(bay.parameters())
    path.genotype = torch.tensor([[2], [3]])
    target = model(x)
    path.genotype = torch.tensor([[0], [0]])
    fitness = lambda g: (setattr(path, "genotype", g), -(model(x) - target).square().mean().item())[1]
    for _ in range(200):  # a tournament of two: the loser becomes a mutated copy of the winner
        rival = torch.where(torch.rand(2, 1) < 0.5, torch.randint(4, (2, 1)), path.genotype)
        path.genotype = max(path.genotype, rival, key=fitness)
    assert path.genotype.flatten().tolist() == [2, 3]
    del path.genotype
    assert model(x).shape == x.shape and bay.routing().index.shape == (2, 1)  # sampled


# Several streams: cross-stitch units over a stack of outputs.


class CrossStitch(mb.Aggregator):
    def build(self, site):
        self.mix = nn.Parameter(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))

    def forward(self, f, x, modules, routing, c):  # x: (streams, b, d)
        outs = torch.stack([modules.output(i, f, x[i], c) for i in range(len(modules))])
        return torch.einsum("st,tbd->sbd", self.mix, outs)


def test_several_streams():
    layer = mb.Modular(None, {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, mb.Uniform(), CrossStitch(), features=4)
    x = torch.randn(2, 3, 4)
    a, b = layer.parts._modules["a"].network(x[0]), layer.parts._modules["b"].network(x[1])
    torch.testing.assert_close(layer(x), torch.stack([0.9 * a + 0.1 * b, 0.1 * a + 0.9 * b]))


# State through time: in and out, explicitly, so that checkpointing and compile see nothing hidden.


class Recurrent(mb.Router):
    def build(self, names, site):
        self.gate = nn.Linear(site.inputs, len(names))

    def forward(self, x, c):
        state = 0.5 * c.state["memory"] + self.gate(x)
        return mb.Routing(weights=state.softmax(-1), state=state)


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = mb.Modular(nn.Linear(4, 4), {"a": mb.LoRA(2), "b": mb.LoRA(2)}, Recurrent(), mb.WeightedSum())

    def forward(self, x, memory):
        c = mb.Context(state={"memory": memory})
        routing = self.cell.router(x, c)
        return self.cell(x, routing=routing, context=c), routing.state


def test_state_through_time():
    step, x = Step(), torch.randn(5, 3, 4)
    randomise(step.cell.parts.parameters())

    def total(call=step):
        memory, total = torch.zeros(3, 2), 0.0
        for t in range(5):
            y, memory = call(x[t], memory)
            total = total + y.square().mean()
        return total

    def gradients(loss):
        return loss, torch.autograd.grad(loss, list(step.parameters()))

    recomputed = total(lambda *inputs: checkpoint(step, *inputs, use_reentrant=False))
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(gradients(recomputed), gradients(total()))
    torch.testing.assert_close(gradients(compiled), gradients(total()))


# A root-level site over whole calls: an ensemble of passes, weighted by a posterior over domains (DEMix).


class Posterior(mb.Aggregator):
    def forward(self, f, x, modules, routing, c):
        outs = []
        for i in range(2):
            c.routes["experts"] = mb.Routing(index=torch.tensor([i]), host=((i,),))
            outs.append(f(x))
        weights = torch.tensor([0.25, 0.75])
        return (weights[:, None, None] * torch.stack(outs)).sum(0)


def test_a_site_over_whole_calls():
    model, x = mlp(), torch.randn(3, 8)
    experts = mb.attach(model, [nn.Linear], {"law": mb.LoRA(2), "news": mb.LoRA(2)}, name="experts")
    randomise(experts.parameters())
    expected = 0.25 * model(x, experts="law") + 0.75 * model(x, experts="news")
    experts.use(None)
    mb.attach(model, "", {}, mb.Uniform(), Posterior(), name="ensemble")
    torch.testing.assert_close(model(x), expected)


# A kind that adds a loss: sparsity of its own update.


@dataclass(frozen=True)
class Lasso(mb.ParameterComposition):
    weight: float = 0.1

    def init(self, sites):
        return {s.name: {"delta": torch.randn(s.outputs, s.inputs)} for s in sites}

    def delta(self, params, site):
        return mb.LowRank(params["delta"], torch.eye(site.outputs))

    def penalty(self, params):
        return self.weight * params["delta"].abs().sum()


def test_a_kind_that_adds_a_loss():
    model = mlp().train()
    bay = mb.attach(model, "0", {"a": Lasso(), "b": Lasso()}, name="task")
    model(torch.randn(2, 8), task="a")
    (name, value), *rest = bay.losses().items()
    assert not rest and "a" in name and value.requires_grad
    torch.testing.assert_close(value, 0.1 * bay.parameters("a")[0].abs().sum())


# Base weights trained under masks, one owner each (PackNet).


@dataclass(frozen=True)
class Owned(mb.ParameterComposition):
    constants: ClassVar[tuple[str, ...]] = ("mask",)

    def init(self, sites):
        return {s.name: {"mask": torch.ones_like(s.weight, dtype=torch.bool)} for s in sites}

    def delta(self, params, site):
        return mb.Mask(params["mask"])


def test_base_weights_trained_under_masks():
    model, x, y = mlp(), torch.randn(16, 8), torch.randn(16, 8)
    bay = mb.attach(model, "0", {"first": Owned(), "second": Owned()}, name="task", freeze=False)
    mask = bay.modulars["0"].parts._modules["first"].mask
    mask[4:] = False  # the first task's weights: rows 0 … 3
    before, out = model[0].weight.clone(), model(x, task="first")
    (model(x, task="first") - y).square().mean().backward()
    model[0].weight.grad[~mask] = 0
    torch.optim.SGD([model[0].weight], lr=0.1).step()
    assert (model[0].weight[4:] == before[4:]).all() and (model[0].weight[:4] != before[:4]).any()
    assert not torch.equal(model(x, task="first"), out)


# A kind that reads its example's label, under tokens that are routed apart.


@dataclass(frozen=True)
class Speaker(mb.FunctionComposition):
    def init(self, sites):
        return {s.name: {"shift": torch.ones(s.outputs)} for s in sites}

    def change(self, params, x, y, c):
        loud = torch.tensor([float(label == "loud") for label in c.label("speaker")])
        return loud.view(-1, *[1] * (y.ndim - 1)) * params["shift"]


def test_the_context_of_routed_tokens_is_that_of_their_examples():
    class Alternate(mb.Router):
        def forward(self, x, c):
            return mb.Routing(index=(torch.arange(x.shape[1]) % 2).expand(x.shape[:2]).unsqueeze(-1))

    layer = mb.Modular(nn.Identity(), {"a": Speaker(), "b": Speaker()}, Alternate(), mb.WeightedSum(), features=4)
    y = layer(torch.zeros(3, 5, 4), speaker=["loud", "still", "loud"])
    assert (y[0] == 1).all() and (y[1] == 0).all() and (y[2] == 1).all()
