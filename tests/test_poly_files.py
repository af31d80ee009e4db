"""peft's checkpoints of several modules with a router: Poly (Polytropon, MHR) and multitask prompts, in and out."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

import modbay as mb
from modbay.cli import app
from modbay.errors import BayError, CompositionError, FileError, LabelError

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.tensor([[3, 8, 1, 40, 7, 9], [11, 2, 30, 4, 6, 5], [1, 2, 3, 4, 5, 6]])
TASKS = torch.tensor([2, 0, 1])
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def base(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def poly(splits=2, tasks=3):
    return peft.PolyConfig(
        task_type="CAUSAL_LM",
        r=3,
        n_tasks=tasks,
        n_skills=4,
        n_splits=splits,
        target_modules=["q_proj", "v_proj", "down_proj"],
    )


def prompts(rank=2):
    return peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=rank, token_dim=32, num_layers=2
    )


def theirs(config, folder):
    """A trained checkpoint of peft's in a folder, and its logits."""
    model = peft.get_peft_model(base(), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "poly_" in name or "prompt_encoder" in name:
                p.add_(torch.randn_like(p) * (2 if "logits" in name else 0.5))
    model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def logits(model, tasks=TASKS):
    return model(input_ids=IDS, task_ids=tasks).logits[:, -IDS.shape[1] :]


CASES = {
    "poly": lambda: poly(1),
    "poly, multi-head": poly,
    "multitask prompts": prompts,
    "multitask prompts, rank one": lambda: prompts(1),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    """peft → modbay → peft → modbay, with rows of several tasks."""
    want = theirs(CASES[case](), tmp_path / "theirs")
    plain = base()(input_ids=IDS).logits
    model = base()
    bay = mb.load(model, tmp_path / "theirs")["peft"]
    assert not any(p.requires_grad for one in bay.fitting.modulars.values() for p in one.parts.parameters())
    assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    assert (want - plain).abs().max() > 0.01
    assert_close(model(input_ids=IDS, task_ids=["2", "0", "1"]).logits[:, -6:], want, atol=1e-5, rtol=1e-5)
    assert_close(logits(model, torch.tensor([-1, -1, -1])), plain, atol=1e-6, rtol=1e-6)  # None: the base alone

    errors = bay.export(tmp_path / "ours")
    assert set(errors) == set(bay.fitting.modulars) and not any(errors.values())
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert_close(logits(back), want, atol=1e-5, rtol=1e-5)
    again = base()
    mb.load(again, tmp_path / "ours", name="skills")
    assert_close(logits(again), want, atol=1e-5, rtol=1e-5)
    first, second = (load_file(tmp_path / at / "adapter_model.safetensors") for at in ("theirs", "ours"))
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert_close(second[key], tensor, atol=1e-6, rtol=1e-5)

    bay.save(tmp_path / "saved")  # and as modbay's own
    saved = base()
    mb.load(saved, tmp_path / "saved")
    assert_close(logits(saved), want, atol=1e-5, rtol=1e-5)


def test_a_bay_made_here_goes_out(tmp_path):
    """One router for all layers, names of tasks, a scale and a temperature: all that peft has no name for is put in."""
    model = base()
    kinds = dict.fromkeys("abc", mb.LoRA(2, alpha=6))
    router = mb.Skills("task", ("nli", "qa"), temperature=2.0, heads=2)
    bay = mb.attach(model, "*.q_proj", kinds, router=router, aggregator=mb.ParameterAverage(), name="task")
    with torch.no_grad():
        for p in [*bay.parameters(), router.logits]:
            p.copy_(torch.randn_like(p))
        bay.export(tmp_path)
        want = model(input_ids=IDS, task=["qa", "nli", "qa"]).logits
        back = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
        assert_close(logits(back, torch.tensor([1, 0, 1])), want, atol=1e-5, rtol=1e-5)


def refused_skills(at="*.q_proj", kinds=None, aggregator=None, **how):
    model = base()
    return mb.attach(
        model, at, kinds or dict.fromkeys("ab", mb.LoRA(2)), router=mb.Skills("task", ("x", "y"), **how),
        aggregator=aggregator or mb.ParameterAverage(),
    )  # fmt: skip


REFUSED = {
    "another gate": (lambda: refused_skills(mode="linear"), CompositionError, "mode='linear'"),
    "another kind": (lambda: refused_skills(kinds=dict.fromkeys("ab", mb.LoHa(2))), CompositionError, "not all LoRA"),
    "a bias": (
        lambda: refused_skills(kinds=dict.fromkeys("ab", mb.LoRA(2, bias=True))), CompositionError, "without a bias",
    ),
    "embeddings": (lambda: refused_skills("*.embed_tokens"), CompositionError, "no Linear"),
    "heads": (lambda: refused_skills(heads=5), CompositionError, "5 heads"),
    "rank": (lambda: refused_skills(kinds=dict.fromkeys("ab", mb.LoRA(40)), heads=2), CompositionError, "2 heads"),
    "a sum": (lambda: refused_skills(aggregator=mb.WeightedSum()), BayError, "say which"),
    "deltas": (lambda: refused_skills(aggregator=mb.ParameterAverage("deltas")), BayError, "say which"),
    "prompts": (
        lambda: mb.attach(
            base(), modules={"s": mb.Prompt(3), "a": mb.FactoredPrompt(3, 1), "b": mb.FactoredPrompt(3, 2)},
            aggregator=mb.PromptProduct("s"),
        ), CompositionError, "FactoredPrompts of one rank",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_has_no_name_for(case, tmp_path):
    make, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        make().export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_folders_are_a_bay_each(tmp_path):
    want = theirs(poly(), tmp_path / "all" / "skills")
    plain = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)).eval()
    plain.save_pretrained(tmp_path / "all" / "style")
    model = base()
    bays = mb.load(model, tmp_path / "all")
    assert {key: bay.names() for key, bay in bays.items()} == {
        "peft": ["style"], "skills": ["skill0", "skill1", "skill2", "skill3"],
    }  # fmt: skip
    with bays["peft"].disable():
        assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    with bays["skills"].disable(), torch.no_grad():
        assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(LabelError):
        logits(model, torch.tensor([3, 0, 0]))
    with pytest.raises(FileError, match=r"POLY is several modules.*mb\.load"):
        mb.attach(base(), "*.q_proj").load(tmp_path / "all", "skills", add=True)


def changed(folder, tensors=None, **config):
    path = folder / "adapter_model.safetensors"
    if tensors:
        save_file({k: v.contiguous() for k, v in tensors(load_file(path)).items()}, path)
    said = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(said))


def without(part):
    return lambda all_: {key: t for key, t in all_.items() if part not in key}


def other(part, change):
    return lambda all_: {key: change(t) if part in key else t for key, t in all_.items()}


DAMAGED = {
    "no router": (poly, without("layers.0.self_attn.q_proj.poly_router"), {}, "has no"),
    "fewer tasks": (poly, other("layers.0.self_attn.q_proj.poly_router", lambda t: t[:2]), {}, "as many splits"),
    "fewer skills": (poly, other("layers.0.self_attn.q_proj.poly_lora_A", lambda t: t[:, :2]), {}, "as many splits"),
    "a flat one": (poly, other("layers.0.self_attn.q_proj.poly_lora_A", lambda t: t[0]), {}, "do not go together"),
    "another width": (poly, other("q_proj.poly_lora_B", lambda t: t[..., :3]), {}, "other shapes"),
    "another kind": (poly, None, {"poly_type": "phatgoose"}, "none that modbay has"),
    "heads": (poly, lambda all_: all_ | {"base_model.model.lm_head.weight": torch.ones(50, 32)}, {}, "heads and"),
    "nothing": (poly, without("poly"), {}, "no tensors of POLY"),
    "no rows": (prompts, without("rows"), {}, "prefix_task_rows"),
    "other rows": (prompts, other("rows", lambda t: t[:2]), {}, "do not fit"),
    "two prompts": (prompts, None, {"num_virtual_tokens": 2}, "virtual tokens"),
    "narrow": (prompts, lambda all_: {k: t[..., :16] if "cols" not in k else t for k, t in all_.items()}, {}, "shapes"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused(case, tmp_path):
    make, tensors, config, match = DAMAGED[case]
    theirs(make(), tmp_path)
    changed(tmp_path, tensors, **config)
    model = base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FileError, match=f"(?i){match}"):
        mb.load(model, tmp_path)
    assert not mb.bays(model) and all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_convert(tmp_path):
    want = theirs(poly(), tmp_path / "theirs")
    base().save_pretrained(tmp_path / "base")

    def convert(source, out, to):
        given = ["convert", source, out, "--to", to, "--model", tmp_path / "base"]
        result = CliRunner().invoke(app, [str(a) for a in given])
        assert result.exit_code == 0, result.output

    convert(tmp_path / "theirs", tmp_path / "own", "modbay")
    model = base()
    assert mb.load(model, tmp_path / "own")["peft"].names() == [f"skill{i}" for i in range(4)]
    assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    convert(tmp_path / "own", tmp_path / "back", "peft")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "back").eval()
    assert_close(logits(back), want, atol=1e-5, rtol=1e-5)


def test_skills_of_a_toy(tmp_path):
    """No transformer, and a new task: its router learns it, while the skills stay as they are."""
    net = nn.Sequential(nn.Linear(8, 6))
    config = peft.PolyConfig(r=2, n_tasks=3, n_skills=4, n_splits=2, target_modules=["0"], init_weights=False)
    made = peft.get_peft_model(copy.deepcopy(net), config).eval()
    made.save_pretrained(tmp_path)
    bay = mb.load(net.eval(), tmp_path)["peft"]
    x = torch.randn(3, 4, 8)
    assert_close(net(x, task_ids=TASKS), made.base_model(x, task_ids=TASKS), atol=1e-6, rtol=1e-5)
    bay.fitting.modulars["0"].router.extend("3")
    net(x, task_ids=["3"] * 3).square().sum().backward()
    (logits,) = (modular.router.logits for modular in bay.fitting.modulars.values())
    assert logits.grad[3].any() and not logits.grad[:3].any()
    assert all(p.grad is None for p in bay.parameters() if p is not logits)
