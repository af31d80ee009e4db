"""Named methods, and bays from YAML."""

import json

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import modbay as mb
from modbay.errors import ConfigError
from modbay.methods import METHODS, BaySpec, default_at, dump, dump_at, dump_kind, parse_bays, parse_kind, place

VALUES = {"language": ["en", "de", "sw"], "task": ["ner", "pos"]}
ROWS = {"language": ["en", "de", "sw", "en"], "task": ["ner", "pos", "ner", "pos"]}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL), add_pooling_layer=False),
    "albert": lambda: AlbertModel(AlbertConfig(**SMALL, embedding_size=8), add_pooling_layer=False),
    "gpt2": lambda: GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30)),
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=30)
    ),
}


class Network(torch.nn.Module):
    """A trunk under a head, as training has it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = MODELS["bert"]()
        self.head = torch.nn.Linear(16, 3)

    def forward(self, input_ids):
        return self.head(self.trunk(input_ids=input_ids).last_hidden_state.mean(1))


def attached(model, specs):
    for spec in specs:
        mb.attach(model, spec.at, spec.modules, spec.router, spec.aggregator, name=spec.name)
    return mb.bays(model)


def called(model, ids):
    words = {word for bay in mb.bays(model).values() for word in bay.state.keywords}
    return model(ids, **{word: ROWS[word] for word in words})


@pytest.mark.parametrize("name", METHODS)
def test_method_trains_saves_and_loads(name, tmp_path):
    torch.manual_seed(0)
    ids, model = torch.randint(30, (4, 5)), Network().eval()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    before = model(ids)
    method = METHODS[name]
    bays = attached(model, method.build(VALUES, "language", at=method.sites(model)))
    torch.testing.assert_close(called(model, ids), before)
    learning = [p for bay in bays.values() for group in bay.parameter_groups(1e-2) for p in group["params"]]
    if not bays:
        assert name == "probe"
        return
    model.train()
    optimiser = torch.optim.Adam(learning, 1e-2)
    for _ in range(2):  # LoRA's A learns from the second step on
        optimiser.zero_grad()
        called(model, ids).square().sum().backward()
        optimiser.step()
    after = called(model.eval(), ids)
    assert not torch.allclose(after, before)
    for key, value in base.items():
        assert torch.equal(model.state_dict()[key], value)
    for bay in bays.values():
        bay.save(tmp_path / "modules")
    again = Network().eval()
    mb.load(again, tmp_path / "modules")
    assert torch.equal(called(again, ids), after)


@pytest.mark.parametrize("name", METHODS)
def test_dump_parses_to_the_same(name):
    specs = METHODS[name].build(VALUES, "language")
    said = json.loads(json.dumps(dump(specs)))
    again = parse_bays(said, VALUES)
    assert dump(again) == said
    for one, two in zip(specs, again, strict=True):
        assert (one.name, one.at, one.modules) == (two.name, two.at, two.modules)
        assert list(one.modules) == list(two.modules)


def test_full_learns_all_of_the_trunk_and_is_the_only_one_to():
    model = Network()
    (bay,) = attached(model, METHODS["full"].build(VALUES)).values()
    own = sum(p.numel() for p in Network().trunk.parameters())
    assert sum(p.numel() for group in bay.parameter_groups(1.0) for p in group["params"]) == own


def test_sequence_composes():
    """The second module works on what the first gave: y₂ = y₁ + Δ(y₁)."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(2, 4)
    bays = attached(model, METHODS["sequence"].build(VALUES, "language", mb.Bottleneck(3, std=0.5), "0"))
    assert list(bays) == ["language", "task"]
    first = model(x, language="en", task=[None, None])
    params = bays["task"].modulars["0"].parts._modules["ner"].tensors()
    change = torch.relu(first @ params["down"].T) @ params["up"].T
    torch.testing.assert_close(model(x, language="en", task="ner"), first + change)
    assert not torch.allclose(change, torch.zeros(2, 4))


@pytest.mark.parametrize("name", MODELS)
def test_default_sites(name):
    model = MODELS[name]()
    at = default_at(model)
    assert dump_at(at) == (["role.qkv"] if name == "gpt2" else ["role.query", "role.value"]) + [
        "role.ffn_in",
        "role.ffn_out",
    ]
    bays = attached(model, METHODS["shared"].build(VALUES, at=at))
    assert len(bays["shared"].modulars) > 2


def test_default_sites_in_doubt():
    with pytest.raises(ConfigError, match=r"default sites of Sequential .*`modbay inspect MODEL` .* at: \[role\.ffn"):
        default_at(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_bays_from_yaml():
    gates = {"TopK": None, "per_site": True}
    hyper = {"kind": {"LoRA": {"rank": 2}}, "label": "task", "labels": ["ner"]}
    said = [
        {
            "name": "a",
            "at": ["mb.role.attention.query", "*.dense", {"part": ["x", 0, 2]}, {"span": ["role.ffn_in", "y"]}],
            "each": "language",
            "kind": {"LoRA": {"rank": 4, "alpha": 8}},
            "router": {"ByLabel": {"label": "language"}},
        },
        {"name": "b", "at": {"at": "*", "features": 3}, "count": 2, "kind": "LoRA", "router": gates},
        {"name": "c", "at": "", "modules": {"h": {"Hyper": hyper}}},
    ]  # fmt: skip
    a, b, c = parse_bays(said, VALUES)
    assert a.at[0] == mb.role.query and a.at[2] == mb.part("x", 0, 2) and a.modules["de"] == mb.LoRA(4, 8)
    assert list(b.modules) == ["module0", "module1"] and isinstance(b.router(), mb.TopK)
    assert c.modules["h"].kind == mb.LoRA(2) and c.router.label == "c"
    assert dump(parse_bays(dump([a, b, c]))) == dump([a, b, c])
    assert parse_kind(dump_kind(mb.Head(("x", "y")))) == mb.Head(("x", "y"))


OK = {"name": "a", "at": "*", "modules": {"m": "LoRA"}}
WRONG = {
    "no list": ("x", "bays: a list of mappings"),
    "no mapping": (["x"], r"bays\[0\]: a mapping is wanted"),
    "unknown key": ([{**OK, "agregator": "WeightedSum"}], r"no 'agregator'; did you mean 'aggregator'\?"),
    "missing": ([{"name": "a", "modules": {"m": "LoRA"}}], "'at' is missing"),
    "name": ([{**OK, "name": "a.b"}], r"name: 'a\.b': text without"),
    "twice": ([OK, OK], "two bays are named 'a'"),
    "kind": ([{**OK, "modules": {"m": "Lora"}}], r"modules\.m: 'Lora' is no kind of module; did you mean 'LoRA'\?"),
    "far kind": ([{**OK, "modules": {"m": "zzzz"}}], "no kind of module; there are .*'BitFit'"),
    "argument": ([{**OK, "modules": {"m": {"LoRA": {"rnk": 8}}}}],
                 r"no argument 'rnk'; did you mean 'rank'\? There are 'rank', 'alpha', 'stable'"),
    "type": ([{**OK, "modules": {"m": {"LoRA": {"rank": "8"}}}}],
             r"LoRA\(rank='8'\): a whole number is wanted, not text"),
    "bool": ([{**OK, "modules": {"m": {"LoRA": {"rank": True}}}}], "a whole number is wanted, not true or false"),
    "either": ([{**OK, "modules": {"m": {"LoRA": {"alpha": "x"}}}}], "a number or null is wanted"),
    "literal": ([{**OK, "modules": {"m": {"Bottleneck": {"placement": "up"}}}}], "'serial' or .* or 'sum' is wanted"),
    "own words": ([{**OK, "modules": {"m": {"Bottleneck": {"activation": "x"}}}}], r"modules\.m: Bottleneck"),
    "no name": ([{**OK, "modules": {"m": {"LoRA": {}, "IA3": {}}}}], "NAME or {NAME"),
    "list": ([{**OK, "modules": {"m": {"LoRA": [8]}}}], r"its arguments are a mapping, {rank: …}"),
    "lacks": ([{**OK, "router": "ByLabel"}], "ByLabel wants 'label', too"),
    "router": ([{**OK, "router": {"TopKk": {}}}], r"no router; did you mean 'TopK'\?"),
    "router type": ([{**OK, "router": {"TopK": {"k": 1.5}}}], "a whole number or null is wanted, not a number"),
    "table": ([{**OK, "router": {"ByLabel": {"label": "x", "table": {"x": ["n"]}}}}], "the table names 'n'"),
    "per site": ([{**OK, "router": {"TopK": {}, "per_site": 1}}], "true or false is wanted"),
    "aggregator": ([{**OK, "aggregator": "Sum"}], "no aggregator; "),
    "no arguments": ([{**OK, "aggregator": {"Concatenate": {"a": 1}}}], "no argument 'a'; there are none"),
    "role": ([{**OK, "at": "role.nothing"}], "the roles are attention"),
    "at": ([{**OK, "at": {"x": 1}}], "a role .* is wanted"),
    "no modules": ([{"name": "a", "at": "*"}], "no modules: say modules"),
    "both": ([{**OK, "count": 3}], "'modules', 'count' exclude each other"),
    "kind beside": ([{**OK, "kind": "LoRA"}], "each of modules has its kind"),
    "no kind": ([{"name": "a", "at": "*", "count": 3}], "not of which kind"),
    "count": ([{"name": "a", "at": "*", "count": 0, "kind": "LoRA"}], "count=0: a whole number from 1"),
    "each": ([{"name": "a", "at": "*", "each": "languag", "kind": "LoRA"}], r"no label of the data; did you mean"),
    "module name": ([{**OK, "modules": {"a/b": "LoRA"}}], "'a/b': a module's name"),
    "empty": ([{**OK, "modules": {}}], "{NAME: KIND} is wanted"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_bays(case):
    said, words = WRONG[case]
    with pytest.raises(ConfigError, match=words):
        parse_bays(said, VALUES)


def test_all_that_is_wrong_is_said_at_once():
    said = [{**OK, "modules": {"m": "Lora", "n": {"LoRA": {"rank": "8", "x": 1}}}, "router": "B"}, {"name": "b"}]
    with pytest.raises(ConfigError) as caught:
        parse_bays(said)
    words = str(caught.value)
    assert all(one in words for one in ("'Lora'", "rank='8'", "'x'", "'B' is no router", "bays[1]: 'at'"))


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("private", {"by": "customer"}, "no such label; there are 'language', 'task'"),
        ("polytropon", {"skils": 3}, r"no option 'skils'; did you mean 'skills'\?"),
        ("polytropon", {"skills": "3"}, "skills='3': a whole number is wanted, not text"),
        ("polytropon", {"skills": 0}, "a whole number from 1"),
        ("polytropon", {"prior": -1.0}, "a number from 0"),
        ("mixture", {"k": 9}, "more experts than there are"),
        ("mixture", {"balance": -1}, "a number from 0"),
        ("sequence", {"by": "task", "then": "task"}, "wants two labels"),
        ("sequence", {"kind": mb.LoRA(2)}, "no order between"),
        ("full", {"kind": mb.LoRA(2)}, "the whole base learns"),
        ("probe", {"at": "*"}, "no modules in the base"),
        ("shared", {"x": 1}, "no option 'x'; there are none"),
    ],
)
def test_wrong_arguments(name, given, words):
    with pytest.raises(ConfigError, match=words):
        METHODS[name].build(VALUES, **{"by": "language", **given})
    with pytest.raises(ConfigError, match="wants two labels"):
        METHODS["sequence"].build({"task": ["a"]}, "task")


def test_label_without_values_and_name_taken():
    with pytest.raises(ConfigError, match="has no values"):
        METHODS["private"].build({"task": []})
    (spec,) = METHODS["shared+private"].build({"task": ["shared", "x"]})
    assert list(spec.modules) == ["shared_", "shared", "x"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (BaySpec("a", lambda name, module: True, {}, mb.Uniform()), "only roles, name patterns"),
        (BaySpec("a", "*", {}, lambda: mb.Uniform()), "only a class, or a partial"),
        (BaySpec("a", "*", {}, type("Own", (mb.Uniform,), {})()), "only what modbay"),
    ],
)  # fmt: skip
def test_what_text_can_not_say(spec, words):
    with pytest.raises(ConfigError, match=words):
        dump([spec])


def test_place():
    assert place(["role.attention.query", "x"]) == [mb.role.query, "x"]
    with pytest.raises(ConfigError, match=r"at='role\.nothing'"):
        place("role.nothing")
