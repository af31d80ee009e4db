"""The unifying view: every module is an addition, f(x) + Δ(x), a prefix by its gate; and what is mixed from several:
MAM, UniPELT, an inventory of many kinds in one bay."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

import modbay as mb
from helpers import SITES, Case, cases, context, function, ids, site_of, trained
from modbay import methods
from modbay.core._engine import apply
from tiny import bert, gpt2, llama, tokens, vit

transformers = pytest.importorskip("transformers")
masking = pytest.importorskip("transformers.masking_utils")

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
MIXABLE = [(case, place) for case, place in cases() if case.id != "head"]  # a head is wider or narrower than f


@pytest.mark.parametrize("case, place", MIXABLE, ids=ids)
def test_every_module_is_an_addition(case: Case, place: str):
    """f(x) + α Δ(x): half the weight is half the change, wherever the module acts."""
    layer = mb.Modular(SITES[place].make(), {"m": case.make()}, mb.Fixed({"m": 1.0}), mb.WeightedSum()).double()
    layer.train(case.trains)
    with torch.no_grad():
        for parameter in layer.parts.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = SITES[place].example(3)
    x = x.double() if x.is_floating_point() else x
    given = {keyword: make(2)[:1] * 3 for keyword, make in case.labels.items()}
    at = lambda weight: layer(x, routing=mb.Routing(weights=torch.tensor([weight], dtype=torch.float64)), **given)
    f = layer.f(x)
    change = at(1.0) - f
    assert change.abs().max() > 1e-3
    assert_close(at(0.0), f)
    assert_close(at(0.5), f + 0.5 * change)
    assert_close(at(-2.0), f - 2 * change)


CHANGES = [
    (case, place)
    for case, place in cases(where=lambda case: isinstance(case.make(), mb.ParameterComposition))
    if place not in ("norm", "block")
]


@pytest.mark.parametrize("case, place", CHANGES, ids=ids)
def test_a_change_of_parameters_is_an_addition(case: Case, place: str):
    """f under θ ⊕ φ, and f(x) + Δ(x) with Δ that knows of no weight but its own."""
    module, site = site_of(place)
    kind, x = case.make(), SITES[place].example(3)
    params = trained(kind, site)
    weight, bias = kind.delta(params, site).dense(site)
    other = {"weight": module.weight + weight}
    rest = 0.0
    if bias is not None and hasattr(module, "bias"):
        other["bias"] = module.bias + bias
    elif bias is not None:  # an embedding has none of its own
        rest = bias
    f, c = function(module, x), context(case, 3)
    y = f(x)
    if kind.enters:
        added = f(x + apply(kind, params, f, x, x, c, site, False))
    else:
        added = y + apply(kind, params, f, x, y, c, site, False)
    assert_close(added, torch.func.functional_call(module, other, (x,)) + rest, **CLOSE)


def gated(module, query, key, value, attention_mask, scaling, **_):
    """(1 − λ) f(x) + λ softmax(q P_kᵀ) P_v, with λ the share of the prefix in the sum of exponentials."""
    front_k, front_v, key, value = (
        part.repeat_interleave(query.shape[1] // part.shape[-3], -3) for part in (*module.front, key, value)
    )
    scores, front = query @ key.mT * scaling, query @ front_k.mT * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    f = scores.softmax(-1) @ value
    gate = torch.sigmoid(front.logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True))
    return ((1 - gate) * f + gate * (front.softmax(-1) @ front_v)).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2, bert, vit])
def test_a_prefix_is_a_gated_addition(make, padded):
    """The whole network in the additive form equals the network with prefixes before its keys and values."""
    model = make().eval()
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16)} if make is vit else {"input_ids": tokens()}
    if padded and make is not vit:
        inputs["attention_mask"] = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    other = copy.deepcopy(model)
    bay = mb.attach(model, mb.role.attention, {"p": mb.Prefix(4)}).use("p")
    transformers.AttentionInterface.register("gated", gated)
    masking.AttentionMaskInterface.register("gated", masking.eager_mask)
    other.set_attn_implementation("gated")
    for name, modular in bay.modulars.items():
        other.get_submodule(name).front = modular.parts._modules["p"].tensors()["prefix"].detach()
    assert_close(model(**inputs).logits, other(**inputs).logits, **CLOSE)


# Mixed from several


def bert_layer(layer, x, query=0.0, value=0.0, prefix=None, change=lambda h, y: 0.0):
    """A BERT layer written out, with what is added to queries, to values, before keys, and to the last projection."""
    own = layer.attention.self
    split = lambda v: v.unflatten(-1, (4, 8)).transpose(1, 2)
    q, k, v = split(own.query(x) + query), split(own.key(x)), split(own.value(x) + value)
    k, v = (torch.cat([front, part], 2) for front, part in zip(prefix, (k, v), strict=True))
    h = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    h = layer.attention.output(h, x)
    y = layer.output.dense(layer.intermediate(h))
    return layer.output.LayerNorm(y + change(h, y) + h)


def parts_of(bay, layer, name="m"):
    """The parameters of one module at one layer, by the end of the site's name."""
    found = {}
    for site, modular in bay.modulars.items():
        part = modular.parts._modules.get(name)
        if f".layer.{layer}." in site and part is not None:
            found[site.rpartition(f".layer.{layer}.")[2]] = (part.tensors(), modular.router)
    return found


def prefix_of(p, rows):
    """P = W_up tanh(W_down P' + b) + b', a (rows, heads, n, d) for keys and one for values."""
    hidden = torch.tanh(p["tokens"] @ p["down"].T + p["down_bias"])
    both = torch.einsum("nm,khdm->khnd", hidden, p["up"]) + p["up_bias"].unsqueeze(-2)
    return [part.expand(rows, -1, -1, -1) for part in both]


def shaken(bay):
    with torch.no_grad():
        for parameter in bay.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return bay


def test_mam_by_hand():
    """Every layer of a BERT: the prefix of the code's MLP, FFN(h) + 4 · adapter(h) before the residual and the norm."""
    model, ids = bert().eval(), tokens()
    base = copy.deepcopy(model).bert
    where = mb.span(mb.role.ffn_in, mb.role.ffn_out)
    bay = shaken(mb.attach(model, modules={"m": methods.mam(prefix=3, size=7, bottleneck=6, ffn=where)}).use("m"))
    x = base.embeddings(ids)
    for i, layer in enumerate(base.encoder.layer):
        found = parts_of(bay, i)
        (front, _), (a, _) = found.pop("attention.self"), *found.values()
        adapter = lambda h, y, a=a: 4 * (F.relu(h @ a["down"].T + a["down_bias"]) @ a["up"].T + a["up_bias"])
        x = bert_layer(layer, x, prefix=prefix_of(front, len(x)), change=adapter)
    assert_close(model.bert(ids).last_hidden_state, x, **CLOSE)


def test_mam_of_the_papers_code():
    """Its defaults for generation: 30 places through 800 features, 512 rows, s = 4, biases, drawn as LoRA is."""
    kinds = methods.mam()
    assert kinds == {
        mb.role.attention: mb.Prefix(30, bottleneck=800),
        mb.role.ffn: mb.Bottleneck(512, placement="parallel", scale=4.0),
    }
    model = llama()
    bay = mb.attach(model, modules={"m": kinds})
    adapter = bay.modulars["model.layers.0.mlp"].parts._modules["m"].tensors()
    assert adapter["down"].shape == (512, 32) and not adapter["up"].any() and not adapter["down_bias"].any()
    d, m, n, layers = 32, 800, 30, 2
    prefix = n * d + m * d + m + layers * (2 * d * m + 2 * d)
    assert sum(p.numel() for p in bay.parameters()) == prefix + layers * (2 * 512 * d + 512 + d)


def test_unipelt_by_hand():
    """Every layer of a BERT as the official code has it: each gate the mean of σ(w · h) over the places, LoRA's in the
    place of α/r, the prefix's on keys and values, the adapter's on the output of the last projection."""
    model, ids = bert().eval(), tokens()
    base = copy.deepcopy(model).bert
    kinds = methods.unipelt(rank=2, prefix=3, bottleneck=6, reduction=8)
    bay = shaken(mb.attach(model, modules={"m": kinds}, router=mb.Gate))
    x, rows = base.embeddings(ids), 3
    for i, layer in enumerate(base.encoder.layer):
        found = parts_of(bay, i)
        gate = {}
        for site, (_, router) in found.items():
            torch.nn.init.normal_(router.weight, std=0.5)
            torch.nn.init.normal_(router.bias)
            gate[site] = lambda h, r=router: torch.sigmoid(h @ r.weight[0] + r.bias[0]).mean(1)[:, None, None]
        last, w = layer.output.dense, torch.randn(32)  # w as the official code has it, of the output
        adapter, router = found["output.dense"]
        with torch.no_grad():
            router.weight.copy_(w @ last.weight)
            router.bias.copy_(w @ last.bias)
        lora = lambda h, site, found=found: h @ found[site][0]["A"].T @ found[site][0]["B"].T
        query, value = (gate[s](x) * lora(x, s) for s in ("attention.self.query", "attention.self.value"))
        prefix = [gate["attention.self"](x)[..., None] * p for p in prefix_of(found["attention.self"][0], rows)]

        def change(h, y, a=adapter, w=w):
            up = F.relu(y @ a["down"].T + a["down_bias"]) @ a["up"].T + a["up_bias"]
            return torch.sigmoid(y @ w).mean(1)[:, None, None] * up

        x = bert_layer(layer, x, query, value, prefix, change)
    assert_close(model.bert(ids).last_hidden_state, x, **CLOSE)


REFERENCE = Path(__file__).parent / "fixtures" / "adapters_mixed.safetensors"  # by benchmarks/_adapters_reference.py


def of_adapters(theirs, name, i):
    """The tensors of a module of adapters' at one layer, by our names: (LoRAs and their gates, prefix, adapter)."""
    self = f"encoder.layer.{i}.attention.self"
    front = f"encoder.layer.0.attention.self.prefix_tuning.pool.prefix_tunings.{name}.self_prefix"
    up = {end: theirs[f"{front}.control_trans.2.{end}"].unflatten(0, (2, 2, 2, 8))[i] for end in ("weight", "bias")}
    prefix = {
        "tokens": theirs[f"{front}.wte.weight"],
        "down": theirs[f"{front}.control_trans.0.weight"], "down_bias": theirs[f"{front}.control_trans.0.bias"],
        "up": up["weight"], "up_bias": up["bias"],
    }  # fmt: skip
    own = f"encoder.layer.{i}.output.adapters.{name}"
    maps = {"down": "adapter_down.0", "up": "adapter_up"}
    adapter = {ours: theirs[f"{own}.{their}.weight"] for ours, their in maps.items()}
    adapter |= {f"{ours}_bias": theirs[f"{own}.{their}.bias"] for ours, their in maps.items()}
    if name == "mam":
        return {"attention.self": prefix, "dense": adapter}, {}
    loras = {
        f"attention.self.{part}": {m: theirs[f"{self}.{part}.loras.{name}.lora_{m}"] for m in "AB"}
        for part in ("query", "value")
    }
    gates = {f"attention.self.{part}": f"{self}.{part}.loras.{name}.gate" for part in ("query", "value")}
    gates |= {"attention.self": f"{self}.prefix_tuning.prefix_gates.{name}", "dense": f"{own}.gate"}
    return {"attention.self": prefix, "dense": adapter, **loras}, gates


@pytest.mark.parametrize("name", ["mam", "unipelt"])
def test_mam_and_unipelt_equal_adapters(name):
    """On the same weights: a gate of the output of a projection is our gate of its input."""
    theirs = load_file(REFERENCE)
    config = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**config, intermediate_size=24, max_position_embeddings=8)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    missing, _ = model.load_state_dict(theirs, strict=False)
    assert not missing
    kinds = {
        "mam": methods.mam(3, 4, bottleneck=6, ffn=mb.span(mb.role.ffn_in, mb.role.ffn_out)),
        "unipelt": methods.unipelt(2, 3, 6, 4),
    }
    router = mb.Gate if name == "unipelt" else mb.Uniform
    bay = mb.attach(model, modules={"m": kinds[name]}, router=router)
    with torch.no_grad():
        for i, layer in enumerate(model.encoder.layer):
            tensors, gates = of_adapters(theirs, name, i)
            for site, (own, router) in parts_of(bay, i).items():
                site = "dense" if site.endswith("dense") else site
                assert own.keys() == tensors[site].keys()
                for key, tensor in tensors[site].items():
                    own[key].copy_(tensor.view_as(own[key]))
                if gates:
                    weight, bias = (theirs[f"{gates[site]}.{end}"] for end in ("weight", "bias"))
                    last = layer.output.dense
                    router.weight.copy_(weight @ last.weight if site == "dense" else weight)
                    router.bias.copy_(weight @ last.bias + bias if site == "dense" else bias)
    assert_close(model(theirs["ids"]).last_hidden_state, theirs[f"output.{name}"], **CLOSE)
    bay.use(None)
    assert not torch.allclose(model(theirs["ids"]).last_hidden_state, theirs[f"output.{name}"], atol=0.1)


def test_unipelt_in_a_mixed_batch():
    """Rows of two tasks and of none, one padded: each gated for itself, and only its own module learns."""
    model, ids, labels = llama().eval(), tokens(4), ["ner", None, "pos", "ner"]
    kinds = methods.unipelt(rank=2, prefix=3, bottleneck=6, reduction=8)
    base = model(ids[1:2]).logits
    bay = mb.attach(
        model, modules={"ner": kinds, "pos": kinds, "idle": kinds}, router=lambda: mb.Gate("task"), name="task"
    )
    shaken(bay)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[3, 4:] = 0
    mixed = model(ids, attention_mask=mask, task=labels).logits
    (mixed * mask[..., None]).square().sum().backward()
    assert all(p.grad is None for p in bay.parameters("idle"))
    assert all(p.grad is not None for p in bay.parameters("ner", "pos"))
    routers = [modular.router for modular in bay.modulars.values()]
    assert len({id(router) for router in routers}) == 8  # a gate at query, value, attention and FFN of two layers
    assert all(router.weight.grad[:2].any(1).all() and not router.weight.grad[2].any() for router in routers)
    for i, label in enumerate(labels):
        t = int(mask[i].sum())
        alone = model(ids[i : i + 1, :t], task=[label]).logits
        assert_close(alone[0], mixed[i, :t], **CLOSE)
    assert_close(mixed[1:2], base, **CLOSE)


def test_an_inventory_of_many_kinds_shares_a_batch(tmp_path):
    """Modules that differ in kind, in sites and in how many: a mixed batch is a loop, kept as files, gone on detach."""
    model, ids = llama().eval(), tokens(6)
    base = model(ids).logits
    kinds = {
        "mam": methods.mam(prefix=3, size=5, bottleneck=4),
        "unipelt": methods.unipelt(2, 4, None, 8),
        "lora": {mb.role.query: mb.LoRA(2), mb.role.value: mb.LoRA(3)},
        "ia3": {mb.role.key: mb.IA3(), mb.role.value: mb.IA3(), mb.role.ffn_out: mb.IA3("input")},
        "adapter": {mb.role.ffn_out: mb.Bottleneck(4)},
    }
    labels = ["mam", None, "unipelt", "lora", "ia3", "adapter"]
    bay = shaken(mb.attach(model, modules=kinds, name="task"))
    mixed = model(ids, task=labels).logits
    weight = torch.randn_like(mixed[:1])
    together = torch.autograd.grad((mixed * weight).sum(), bay.parameters())
    alone = [model(ids[i : i + 1], task=[label]).logits for i, label in enumerate(labels)]
    assert_close(torch.cat(alone), mixed, **CLOSE)
    assert_close(mixed[1], base[1], **CLOSE)
    loop = torch.autograd.grad(sum((out * weight).sum() for out in alone), bay.parameters())
    for a, b in zip(together, loop, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-4)
    bay.save(tmp_path)
    bay.detach()
    assert torch.equal(model(ids).logits, base)
    mb.load(model, tmp_path)
    assert_close(model(ids, task=labels).logits, mixed)
