"""The idea of modbay, from one equation to Polytropon: ten minutes to read, seconds to run (`python docs/tour.py`).

    y = A(f, x, {m_1 … m_n}, r(x, c), c)

A network has a function f at some place. Modules m_i change it, each in its own way. A router r says which of them
count for an input x, and how much; it may also look at c, what a call carries beside x: labels, masks, other
modalities. An aggregator A makes one output of it all. Adapters, mixtures of experts, hypernetworks, prompts and
multi-task learning are choices of these terms (Pfeiffer, Ruder, Vulić and Ponti, "Modular Deep Learning", 2023,
arXiv 2302.11529).

Each cell below makes a claim in prose, and asserts it.
"""

# %% What is needed
import copy
import itertools
import tempfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import modbay as mb

torch.manual_seed(0)


def moved(parameters, scale=0.2):
    """Stands for training, where only its outcome matters: every parameter moves."""
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * torch.randn_like(p))


# %% 1. The equation is one layer
# f is a Linear; the modules are two LoRAs (W + BA, of rank 4); r goes by the call's label; A adds up what they add.
f = nn.Linear(8, 8)
layer = mb.Modular(f, {"en": mb.LoRA(4), "de": mb.LoRA(4)}, mb.ByLabel("language"), mb.WeightedSum())

x = torch.randn(3, 5, 8)  # (batch, time, features)
assert_close(layer(x, language="en"), f(x))  # a new LoRA changes nothing

moved(layer.parts.parameters())
mixed = layer(x, language=["en", "de", None])  # each example its own module, in one pass; None: f alone
for row, language in enumerate(["en", "de", None]):
    assert_close(mixed[row], layer(x[row : row + 1], language=[language])[0])

# %% 2. Kinds: what a module does to f
# A kind is a small frozen dataclass; its fields are its hyper-parameters. It holds no tensors: `init` makes them, and
# the rest is a pure function of them. So parameters are averaged, generated, frozen and saved without the kind's help.
assert mb.LoRA(4) == mb.LoRA(rank=4)
assert {k: tuple(t.shape) for k, t in mb.LoRA(4).init([layer.site])[""].items()} == {"A": (4, 8), "B": (8, 4)}

# There are four ways to change a function. A kind takes one of them.
assert isinstance(mb.LoRA(4), mb.ParameterComposition)  # f_{θ ⊕ φ}(x): LoRA, IA3, BitFit, SparseDelta
assert isinstance(mb.Prefix(4), mb.InputComposition)  # f_θ([φ, x]): Prompt, Prefix
assert isinstance(mb.Bottleneck(4), mb.FunctionComposition)  # f_θ(x) + Δ: adapters, after f or beside it
assert isinstance(mb.FeedForward(4), mb.Replacement)  # f_φ(x) instead: experts, heads, trainable copies

# Different kinds are as good in one batch as equal ones.
kinds = {"lora": mb.LoRA(4), "adapter": mb.Bottleneck(4), "expert": mb.FeedForward(16)}
zoo = mb.Modular(f, kinds, mb.ByLabel("who"), mb.WeightedSum())
moved(zoo.parts.parameters())
out = zoo(x, who=["expert", "lora", "adapter"])
assert_close(out[1], zoo(x[1:2], who="lora")[0])

# %% 3. Deltas: the few forms that an update of parameters has
# LoRA's is LowRank, BitFit's Bias, IA3's Scale … Each acts on x without being materialised, or can be, when modules are
# folded into the base, merged or exported. That is written once a delta, never once a method.
english = layer.order[0]
delta = english.kind.delta(english.tensors(), layer.site)
weight, bias = delta.dense(layer.site)
assert isinstance(delta, mb.LowRank) and bias is None
assert_close(f(x) + delta.apply(x, f(x), layer.site), F.linear(x, f.weight + weight, f.bias))
assert_close(delta.scale(0.5).dense(layer.site)[0], 0.5 * weight)

# %% 4. Routing: which modules count, and how much. Granularity is a shape
change = [layer(x, language=name) - f(x) for name in ("en", "de")]  # what each adds, alone

for_all = torch.tensor([0.7, 0.3])  # (n,): one route for all
assert_close(layer(x, routing=mb.Routing(weights=for_all)), f(x) + 0.7 * change[0] + 0.3 * change[1])

an_example = torch.rand(3, 2)  # (b, n): one an example
expected = f(x) + sum(an_example[:, i].view(3, 1, 1) * change[i] for i in range(2))
assert_close(layer(x, routing=mb.Routing(weights=an_example)), expected)

a_token = torch.randint(-1, 2, (3, 5, 1))  # (b, t, k): one a token; sparse: an index into the modules, −1 for none
expected = f(x) + sum((a_token == i) * change[i] for i in range(2))
assert_close(layer(x, routing=mb.Routing(index=a_token)), expected)

# A router makes a Routing from x and c. TopK reads x; it is what makes a sparse mixture of experts. There is no f here.
moe = mb.Modular(None, {str(i): mb.FeedForward(16) for i in range(4)}, mb.TopK(k=2), mb.Mixture(), features=8)
moe.train()
context = mb.Context()
assert moe(x, context=context).shape == x.shape
assert [name for name, _ in context.losses] == ["balance"]  # what a router needs to learn comes with its route
assert moe.router(x, mb.Context()).index.shape == (3, 5, 2)  # two experts a token: only they run

# %% 5. Aggregators: one output from the active modules
both = mb.Routing(weights=torch.tensor([0.5, 0.5]))
averaged = {}
for of in ("parameters", "deltas"):
    layer.aggregator = mb.ParameterAverage(of)
    averaged[of] = layer(x, routing=both)
layer.aggregator = mb.WeightedSum()
assert_close(averaged["deltas"], layer(x, routing=both))  # Σ α BA: linear, so outputs or weights, it is the same
assert not torch.allclose(averaged["parameters"], averaged["deltas"])  # (Σ αB)(Σ αA) is something else: Polytropon's

# The others: Sequence (one after another), Mixture (instead of f), AdapterFusion (attend over them), Concatenate
# (prompts end to end), Stack (all of them, side by side). `modbay methods` lists all, with their papers.

# %% 6. The equation at many places: attach
# `attach` puts that layer at each site of a model, in place. A site is found by name pattern, by type, or by its role,
# which is read from the model's structure. The model keeps its class and its checkpoint's keys; its weights are frozen.
config = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
ids = torch.randint(3, 50, (4, 6))
bare = model(ids).logits

assert mb.attach(model, at="*.q_proj", name="trial").detach() is model  # in, and out again
bay = mb.attach(
    model,
    at=[mb.role.query, mb.role.value],
    modules={"en": mb.LoRA(2), "de": mb.LoRA(2)},
    router=mb.ByLabel("language"),  # one object: one route for all sites, made where the call begins
    name="language",
)
assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, LlamaForCausalLM)
assert model.state_dict().keys() == before.keys()
assert len(bay.modulars) == 4 and all(isinstance(m, mb.Modular) for m in bay.modulars.values())
moved(bay.parameters())

# A module is a name: its parts at every site together. A label is a keyword of the call, and a batch may mix them.
languages = ["de", "en", None, "de"]
logits = model(ids, language=languages).logits
for row, language in enumerate(languages):
    assert_close(logits[row], model(ids[row : row + 1], language=[language]).logits[0])
assert_close(logits[2], bare[2])
assert model.generate(ids, language=languages, max_new_tokens=3, do_sample=False).shape == (4, 9)

# `use` sets what holds until it is changed, for callers that pass no label: pipelines, Trainer, servers.
bay.use("de")
assert_close(model(ids).logits[0], logits[0])
bay.use({"en": 0.7, "de": 0.3})  # any mixture
bay.use()  # the labels of the call decide again

# %% 7. Extending: what is there does not move, by a bit
frozen = [p.clone() for p in bay.freeze("en", "de").parameters("en", "de")]
bay.add("sw", mb.Bottleneck(4))  # a third language comes, with a kind of its own
optimiser = torch.optim.AdamW(bay.parameter_groups(lr=1e-2), weight_decay=0.1)
start = model(ids, labels=ids, language="sw").loss
for _ in range(5):
    optimiser.zero_grad()
    model(ids, labels=ids, language=["en", "sw", "sw", "sw"]).loss.backward()
    optimiser.step()
assert model(ids, labels=ids, language="sw").loss < start
assert all(torch.equal(old, new) for old, new in zip(frozen, bay.parameters("en", "de"), strict=True))
assert_close(model(ids, language=languages).logits, logits)

# Several bays compose: first the language, then the task. A module's kind may differ by site, and then says its sites.
task = mb.attach(
    model,
    modules={"ner": {mb.role.attention: mb.Prefix(3), mb.role.ffn: mb.Bottleneck(8)}, "pos": {mb.role.ffn: mb.IA3()}},
    name="task",
)
out = model(ids, language=languages, task=["ner", "pos", "ner", None]).logits
assert_close(out[3], logits[3])
try:
    bay.detach()
except mb.errors.BayError as error:
    assert "Detach 'task' first" in str(error)  # the last attached detaches first; errors say the way out
task.detach()
bay.remove("sw")
assert_close(model(ids, language=languages).logits, logits)

# %% 8. Modules are files, may be folded into the weights, and leave no trace
with tempfile.TemporaryDirectory() as folder:
    bay.save(folder)  # safetensors and JSON; a module alone is bay.save(folder, "de")
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(before)
    loaded = mb.load(other, folder)["language"]  # router and aggregator too; on another base it raises
    assert_close(other(ids, language=languages).logits, logits)

bay.fold("de")  # from here on the base's own weights are those of "de", at no cost a call
assert_close(model(ids).logits[0], logits[0])
bay.unfold()

assert bay.detach() is model
assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
assert torch.equal(model(ids).logits, bare)  # bit for bit


# %% 9. A kind of your own
# One of the four ways, two methods. Nothing else has to know of it.
@dataclass(frozen=True)
class Kronecker(mb.ParameterComposition):
    """W + A ⊗ B, with A (n, n), and B (outputs / n, inputs / n) zero at first: the form of Compacter's factors."""

    n: int = 2

    def init(self, sites):
        return {site.name: {"A": torch.randn_like(site.empty(self.n, self.n)), "B": self.small(site)} for site in sites}

    def small(self, site):
        return site.zeros(site.features("outputs") // self.n, site.features("inputs") // self.n)

    def delta(self, params, site):
        return mb.Dense(torch.kron(params["A"], params["B"]))


bay = mb.attach(model, at=mb.role.query, modules={"a": Kronecker(), "b": Kronecker(4), "c": mb.LoRA(2)}, name="who")
moved(bay.parameters())
out = model(ids, who=["a", "b", "c", None]).logits  # it runs in mixed batches …
assert_close(out[1], model(ids[1:2], who="b").logits[0])
bay.fold("b")  # … and folds; it freezes, averages and saves, too
assert_close(model(ids[1:2]).logits[0], out[1])
bay.unfold()
bay.detach()

# %% 10. Polytropon: skills that tasks share (Ponti, Sordoni, Bengio and Reddy, 2022, arXiv 2202.13914)
# Suppose that each task needs a few of some skills, and nobody says which. Polytropon learns both: a module for each
# skill, and for each task a gate on every module; a task's modules are averaged. m = LoRA, r = Skills, A =
# ParameterAverage. To see whether that works we need a world whose truth is known: ten tasks, made from three skills.
# The world is the same composition, with gates that are set and modules that are drawn.
#
# Polytropon averages A and B apart. Here their products are averaged (section 5), in both: of seeds 0 to 7 all then
# find every gate in 400 steps, with A and B apart five.
torch.manual_seed(2)
NEEDS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]] * 2)  # (tasks, skills)
TASKS = [f"task {i}" for i in range(len(NEEDS))]


def polytropon(model, tasks):
    modules = {f"skill {i}": mb.LoRA(2) for i in range(3)}
    return mb.attach(model, "0", modules, mb.Skills("task", tasks), mb.ParameterAverage("deltas"), name="skills")


base = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
world, alone = copy.deepcopy(base).eval(), copy.deepcopy(base)
true = polytropon(world, [*TASKS, "new"])  # the new task needs skills 0 and 2, a pair that no other task needs
with torch.no_grad():
    for p in true.parameters():
        p.normal_(std=(2 / p.shape[-1]) ** 0.5)
    true.state.router.logits.copy_(torch.cat([NEEDS, torch.tensor([[1, 0, 1]])]) * 200.0 - 100)
world.requires_grad_(False)

skills = polytropon(base, TASKS)
router = skills.state.router
optimiser = torch.optim.Adam(skills.parameter_groups(lr=1e-2, router_lr=5e-2))
schedule = torch.optim.lr_scheduler.StepLR(optimiser, step_size=300, gamma=0.2)
for _ in range(400):
    x, task = torch.randn(80, 16), torch.arange(10).repeat_interleave(8)  # an index tensor is a label, too
    loss = F.mse_loss(base(x, task=task), world(x, task=task))
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    schedule.step()

# Skills have no names: we look for the order in which they agree with the world's. All 30 gates are then right.
base.eval()
gates = (router.logits > 0).long()
assert any(torch.equal(gates[:, list(order)], NEEDS) for order in itertools.permutations(range(3)))

# %% 11. A new task, eight examples: learn the routing only
# The modules stay as they are, and three gates are all that there is to learn. A LoRA of the task's own, from scratch,
# has 64 numbers to learn from the same examples.
x, x_test = torch.randn(8, 16), torch.randn(500, 16)
y, y_test = world(x, task="new"), world(x_test, task="new")


def fitted(model, parameters, lr, **label):
    optimiser = torch.optim.Adam(parameters, lr=lr)
    for _ in range(150):
        optimiser.zero_grad()
        F.mse_loss(model(x, **label), y).backward()
        optimiser.step()
    with torch.no_grad():
        return F.mse_loss(model(x_test, **label), y_test).item()


skills.freeze()
known = router.logits[:10].clone()
router.extend("new")  # one more row of gates; modbay logs that an optimiser must be given it
few = fitted(base, [router.logits], 0.1, task="new")
assert torch.equal(router.logits[:10], known)  # the ten tasks do not notice

fresh = mb.attach(alone, "0", {"new": mb.LoRA(2)}, name="fresh").use("new")
scratch = fitted(alone, fresh.parameters(), 1e-2)
assert few < scratch / 5
print(f"A new task from eight examples: error {few:.4f} by routing alone, {scratch:.4f} with a LoRA of its own.")
