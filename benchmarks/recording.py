"""What `bay.record()` costs: a step and a forward while it records, over the same without it.

BERT-like, 6 layers of 512. Eight LoRAs on the feed-forward part's linears, two for each token by a gate at each of the
12 sites; the same by example; and by one gate for all sites. Training: 4 × 64 tokens, forward, backward, AdamW.
Serving: 64 tokens of one example, and of 8. Tasks are labels of the calls. Seconds are of this process's one thread,
for what is looked for is smaller than what a busy neighbour takes.
"""

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from _measure import arguments, finish, interleaved, table
from torch import nn
from transformers import BertConfig, BertModel

import modbay as mb

TASKS = ("a", "b", "c", "d")
ROUTERS: dict[str, Any] = {
    "token, each site": lambda: mb.TopK(2),
    "example, each site": lambda: mb.TopK(2, by="example"),
    "token, shared": mb.TopK(2),
}


def model(router: Any) -> tuple[nn.Module, mb.Bay]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    base = BertModel(config, add_pooling_layer=False)
    shared = isinstance(router, mb.Router)
    at = mb.role.ffn_in if shared else [mb.role.ffn_in, mb.role.ffn_out]
    return base, mb.attach(base, at, {f"e{i}": mb.LoRA(8) for i in range(8)}, router, name="experts")


def step(base: nn.Module, bay: mb.Bay, rows: int) -> Callable[[], None]:
    ids, mask = torch.randint(0, 1000, (rows, 64)), torch.ones(rows, 64)
    optimiser = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        base.train()
        optimiser.zero_grad()
        out = base(input_ids=ids, attention_mask=mask).last_hidden_state
        (out.square().mean() + sum(bay.losses().values())).backward()
        optimiser.step()

    return run


def forward(base: nn.Module, bay: mb.Bay, rows: int) -> Callable[[], None]:
    ids, mask = torch.randint(0, 1000, (rows, 64)), torch.ones(rows, 64)

    @torch.no_grad()
    def run() -> None:
        base.eval()
        base(input_ids=ids, attention_mask=mask)

    return run


def recorded(stack: ExitStack, bay: mb.Bay, run: Callable[[], None], rows: int, tokens: int) -> Callable[[], None]:
    """The call inside a recording that goes on, with labels; what the call left is summed within its time."""
    told = stack.enter_context(bay.record(tokens=tokens))
    labels = [TASKS[i % len(TASKS)] for i in range(rows)]

    def call() -> None:
        told.label(task=labels)
        run()
        told.label()

    return call


def main() -> None:
    options = arguments(__doc__ or "")
    rows, raw = [], []
    for name, router in ROUTERS.items():
        cases = {"training, 4 × 64": (step, 4), "serving, 8 × 64": (forward, 8), "serving, 1 × 64": (forward, 1)}
        models = [model(copy.deepcopy(router)) for _ in range(3)]  # alike: a hook that is there would cost all of them
        for what, (make, n) in cases.items():
            with ExitStack() as stack:
                runs = [make(base, bay, n) for base, bay in models]
                contenders = {"without": runs[0]}
                for key, i, tokens in (("recorded", 1, 0), ("with tokens", 2, 4096)):
                    contenders[key] = recorded(stack, models[i][1], runs[i], n, tokens)
                times = interleaved(contenders, options.rounds, time.process_time)
            median = {key: statistics.median(several) for key, several in times.items()}
            over = {f"{key}, %": 100 * (median[key] / median["without"] - 1) for key in list(median)[1:]}
            least = 100 * (min(times["recorded"]) / min(times["without"]) - 1)
            rows.append({"routed by": name, "": what, "ms": 1e3 * median["without"]} | over | {"of minima, %": least})
            raw.append(times)
    table("What recording adds", rows)
    finish(options, rows, raw)


if __name__ == "__main__":
    main()
