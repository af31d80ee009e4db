"""A batch of 64 examples by K different LoRAs: how much slower than the bare model?

Llama-like, 8 layers of 512 (feed-forward 1,376), rank 8, 64 LoRAs registered, fp32, forward, no gradients. Beside
modbay: its modules packed, the best hand-written batched product, and peft's `adapter_names` if peft is there.
"""

import random

import torch
from _measure import arguments, finish, interleaved, ratios, table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import modbay as mb

BATCH, RANK = 64, 8
CASES = {  # (tokens, K): K modules in the batch, or as many as Zipf's law draws
    "q, v": ((1, 1), (1, 16), (1, 64), (1, "zipf"), (16, 64), (16, "zipf")),
    "all 7 linears": ((1, 1), (1, 16), (1, 64), (1, "zipf")),
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def labels(k: int | str) -> list[int]:
    """K equal groups, in mixed order; or group sizes by Zipf's law, as real traffic has them."""
    draw = random.Random(0)
    if k == "zipf":
        return draw.choices(range(64), [1 / (i + 1) for i in range(64)], k=BATCH)
    out = [i % int(k) for i in range(BATCH)]
    draw.shuffle(out)
    return out


class HandWritten(nn.Module):
    """A Linear with stacked LoRAs: gather rows by group, two batched products. Groups must be of equal size."""

    def __init__(self, base: nn.Linear, n: int):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(n, RANK, base.in_features) * 0.02)
        self.b = nn.Parameter(torch.randn(n, base.out_features, RANK) * 0.02)

    def forward(self, x):
        ids, order, back = HandWritten.plan
        y = self.base(x)
        rows = x[order].view(len(ids), -1, x.shape[-1])
        change = torch.bmm(torch.bmm(rows, self.a[ids].mT), self.b[ids].mT)
        return y + change.view(*x.shape[:-1], -1)[back]


def hand_written(targets: list[str]) -> nn.Module:
    base = model()
    for name, module in list(base.named_modules()):
        if name.rpartition(".")[2] in targets:
            base.get_submodule(name.rpartition(".")[0]).register_module(
                name.rpartition(".")[2], HandWritten(module, 64)
            )
    return base


def ours(targets: list[str], packed: bool = False) -> nn.Module:
    base = model()
    bay = mb.attach(base, [f"*.{t}" for t in targets], {f"m{i}": mb.LoRA(RANK) for i in range(64)}, name="which")
    for parameter in bay.parameters():
        nn.init.normal_(parameter, std=0.02)
    if packed:
        bay.pack()
    return base


def peft_model(targets: list[str]) -> nn.Module | None:
    try:
        import peft
    except ImportError:
        return None
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
    base = peft.get_peft_model(model(), config, adapter_name="m0")
    for i in range(1, 64):
        base.add_adapter(f"m{i}", config)
    return base.eval()


def main() -> None:
    options = arguments(__doc__ or "")
    rows, raw = [], []
    bare = model()
    for targets, name in ((["q_proj", "v_proj"], "q, v"), (ALL, "all 7 linears")):
        mine, packed, hand, peft = ours(targets), ours(targets, True), hand_written(targets), peft_model(targets)
        for tokens, k in CASES[name]:
            ids, which = torch.randint(0, 1000, (BATCH, tokens)), labels(k)
            names = [f"m{i}" for i in which]
            contenders = {
                "bare": lambda ids=ids: bare(ids),
                "modbay": lambda ids=ids, names=names, mine=mine: mine(ids, which=names),
                "packed": lambda ids=ids, names=names, packed=packed: packed(ids, which=names),
            }
            if k != "zipf":
                order = torch.tensor(sorted(range(BATCH), key=lambda i, w=which: w[i]))
                plan = (torch.arange(int(k)), order, order.argsort())
                contenders["hand-written"] = lambda ids=ids, plan=plan, hand=hand: (
                    setattr(HandWritten, "plan", plan), hand(ids))  # fmt: skip
            if peft is not None and k == 64:
                contenders["peft"] = lambda ids=ids, names=names, peft=peft: peft(ids, adapter_names=names)
            with torch.no_grad():
                times = interleaved(contenders, options.rounds)
            rows.append({"targets": name, "tokens": tokens, "K": k} | ratios(times))
            raw.append(times)
            print(*(f"{key} {value:.2f}" if isinstance(value, float) else value for key, value in rows[-1].items()))
        del mine, packed, hand, peft
    table("A batch of 64 by K LoRAs, time over the bare model's", rows)
    finish(options, rows, raw)


if __name__ == "__main__":
    with torch.no_grad():
        main()
