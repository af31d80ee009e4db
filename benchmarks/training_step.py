"""A training step with one module, over a hand-written one: forward, backward, AdamW.

BERT-like, 6 layers of 512, 4 × 64 tokens. LoRA and (IA)³ on query, value and the feed-forward part's linears; a
bottleneck after each layer's output. Beside them peft's, and full fine-tuning, for orientation.
"""

import torch
from _measure import arguments, finish, interleaved, ratios, table
from torch import nn
from transformers import BertConfig, BertModel

import modbay as mb


def model() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).train()


def targets(base: nn.Module) -> list[str]:
    ends = ("query", "value", "intermediate.dense", "output.dense")
    return [n for n, m in base.named_modules() if n.endswith(ends) and "attention.output" not in n]


class HandLoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, nn.Parameter(torch.randn(8, base.in_features) * 0.02)
        self.b = nn.Parameter(torch.zeros(base.out_features, 8))

    def forward(self, x):
        return self.base(x) + (x @ self.a.mT) @ self.b.mT


class HandIA3(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.ones(base.out_features))

    def forward(self, x):
        return self.base(x) * self.scale


class HandBottleneck(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(512, 64), nn.Linear(64, 512)

    def forward(self, *inputs):
        y = self.base(*inputs)
        return y + self.up(torch.relu(self.down(y)))


def replaced(wrap, names) -> nn.Module:
    base = model().requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        base.get_submodule(parent).register_module(child, wrap(base.get_submodule(name)))
    return base


def outputs(base: nn.Module) -> list[str]:
    return [n for n, m in base.named_modules() if type(m).__name__ == "BertOutput"]


def attached(kind, names) -> nn.Module:
    base = model()
    mb.attach(base, list(names), {"one": kind}, mb.Fixed({"one": 1.0}))
    return base


def peft_model(kind: str) -> nn.Module | None:
    try:
        import peft
    except ImportError:
        return None
    names = targets(model())
    if kind == "LoRA":
        return peft.get_peft_model(model(), peft.LoraConfig(r=8, lora_alpha=8, target_modules=names))
    return peft.get_peft_model(model(), peft.IA3Config(target_modules=names, feedforward_modules=[]))


def step(base: nn.Module, ids: torch.Tensor):
    optimiser = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        optimiser.zero_grad()
        base(ids).last_hidden_state.square().mean().backward()
        optimiser.step()

    return run


def main() -> None:
    options = arguments(__doc__ or "")
    ids, names, outs = torch.randint(0, 1000, (4, 64)), targets(model()), outputs(model())
    rows, raw = [], []
    cases = {
        "LoRA": (HandLoRA, mb.LoRA(8), names),
        "bottleneck": (HandBottleneck, mb.Bottleneck(size=64), outs),
        "(IA)³": (HandIA3, mb.IA3(), names),
    }
    for name, (hand, kind, where) in cases.items():
        contenders = {"hand-written": step(replaced(hand, where), ids), "modbay": step(attached(kind, where), ids)}
        peft = peft_model(name) if name != "bottleneck" else None
        if peft is not None:
            contenders["peft"] = step(peft, ids)
        if name == "LoRA":
            contenders["full fine-tuning"] = step(model(), ids)
        times = interleaved(contenders, options.rounds)
        low = min(times["hand-written"])
        rows.append({"module": name} | ratios(times) | {"modbay, of minima": min(times["modbay"]) / low})
        raw.append(times)
    table("A training step, time over a hand-written module's", rows)
    finish(options, rows, raw)


if __name__ == "__main__":
    main()
