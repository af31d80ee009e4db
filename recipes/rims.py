"""Recurrent independent mechanisms on the copying task: cells that compete for the input, beside an LSTM.

Goyal, Lamb, Hoffmann, Sodhani, Levine, Bengio and Schölkopf, "Recurrent Independent Mechanisms", 2021 (arXiv
1909.10893), scaled down: digits are to be recalled after T blanks; train at T = 10 … 20, test at 20 and 80.

    y = A(f, x, {m_1 … m_k}, r(x, c), c), once a time step

    x  (k, b, 2d)       the states [h | c] of all cells, in and out: nobody else keeps them; c.arguments["input"] (b, e)
    m  Cell             an LSTM cell with parameters of its own
    r  NullAttention    each cell attends to the input and to nothing; the kA that least prefer nothing are active
    A  Communicate      active cells read the input they attended to, step, and then attend to all cells
    f  none             a cell that is not active keeps its state

Where it differs: the official code lets active cells attend to the steps that inactive cells did not take, too; here,
as in the paper, they see the state that those kept. Its dropout (0.5, and 0.1 in the attention) and its small first
weights (0.01) are for 600 units: here there is none unless asked for, and weights start larger. Five digits instead of
ten, a T that is drawn anew for each batch, gradients clipped at 0.5, and a rate that starts at 6e-3 and falls to zero
instead of 1e-3 throughout, for a run of minutes instead of hours. Of seed 0, after 14,000 steps, cross-entropy of the
digits in nats: RIM 0.002 at T = 20 and 0.019 at 80, an LSTM of as many units 0.047 and 0.314; the paper, with ten
digits, T = 50 and 200 and far longer training, has 0.00 at both for RIMs. With T = 20, stopped at step 16,000: 0.010
at 20, but up and down between 0.03 and 0.36 at 80 from step 12,000 on.

    python recipes/rims.py [--steps 14000] [--seeds 0 1 2] [--smoke]
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modbay as mb

SYMBOLS, MARKER = 8, 9  # digits 1 … 8; 0 is blank, 9 asks for them


def copying(batch: int, digits: int, blanks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens, targets), both (b, 2 n + T): n digits, T − 1 blanks, marker, n blanks; and the n digits at the end."""
    given = torch.randint(1, SYMBOLS + 1, (batch, digits), generator=generator)
    tokens = F.pad(given, (0, blanks + digits))
    tokens[:, digits + blanks - 1] = MARKER
    return tokens, F.pad(given, (blanks + digits, 0))


def maps(k: int, inputs: int, outputs: int) -> nn.Parameter:
    """A linear map for each of k cells, (k, i, o)."""
    return nn.Parameter(torch.randn(k, inputs, outputs) / math.sqrt(inputs))


@dataclass(frozen=True)
class Cell(mb.Replacement):
    """(h', c') = LSTM(a, (h, c)) on rows [a | h | c]: a (…, inputs) the attended input, h and c (…, size) the state."""

    batched: ClassVar[bool] = True
    inputs: int
    size: int

    def init(self, sites: Sequence[mb.Site]) -> dict[str, dict[str, Tensor]]:
        bound = 1 / math.sqrt(self.size)
        draw = lambda site, *shape: site.empty(*shape).uniform_(-bound, bound)
        n = 4 * self.size
        return {s.name: {"weight": draw(s, n, self.inputs + self.size), "bias": draw(s, n)} for s in sites}

    def forward(self, params, x: Tensor, f, c: mb.Context) -> Tensor:
        rows, cell = x.split([self.inputs + self.size, self.size], -1)
        new, gates = (rows @ params["weight"].mT + params["bias"].unsqueeze(-2)).split([self.size, 3 * self.size], -1)
        take, keep, give = gates.sigmoid().chunk(3, -1)
        cell = keep * cell + take * new.tanh()
        return torch.cat([give * cell.tanh(), cell], -1)


class NullAttention(mb.Router):
    """α_j = softmax([q_jᵀk, 0]/√d_k)_0, q_j = W_j h_j, k = W x, where a null input scores 0; the kA largest are active.

    Its routing is one a slot: index (k, b, 1) is the slot's own cell, −1 if it is not active; weights (k, b, 1) are α.
    """

    def __init__(self, k: int, active: int, inputs: int, size: int, keys: int):
        super().__init__()
        self.active, self.size, self.keys = active, size, keys
        self.query, self.key = maps(k, size, keys), maps(1, inputs, keys)

    def forward(self, x: Tensor, c: mb.Context) -> mb.Routing:
        scores = (x[..., : self.size] @ self.query) * (c.arguments["input"] @ self.key)  # (k, b, d_k)
        alpha = (scores.sum(-1, keepdim=True) / math.sqrt(self.keys)).sigmoid()  # softmax beside a score of 0
        best = alpha.detach().topk(self.active, 0).indices  # (kA, b, 1)
        return mb.Routing(weights=alpha, index=torch.full_like(alpha, -1, dtype=torch.long).scatter(0, best, best))


class Communicate(mb.Aggregator):
    """h_j ← h̃_j + σ(G o_j) tanh(F o_j) for active j, with h̃ the stepped state and o_j what j attends to among all h̃.

    Gradients into cells that are not active are cut in the attention, as in the official code. `sparse`: only active
    cells run. Otherwise all do, as in that code, and the rest is dropped: the same, and quicker for cells so small.
    """

    def __init__(self, k: int, inputs: int, attended: int, size: int, heads: int = 4, keys: int = 16):
        super().__init__()
        self.heads, self.sparse, self.all = heads, False, {}
        self.read = maps(1, inputs, attended)
        self.qkv = maps(k, size, 3 * heads * keys)
        self.out = nn.Linear(heads * keys, 2 * size)

    def forward(self, f, x: Tensor, modules, routing: mb.Routing, c: mb.Context) -> Tensor:
        active = routing.index >= 0  # (k, b, 1)
        value = routing.weights * (c.arguments["input"] @ self.read)  # (k, b, attended); the null input's value is 0
        slots = torch.cat([value, x], -1)  # [a | h | c]
        route = mb.Routing(index=routing.index) if self.sparse else self.everyone(*x.shape[:2])
        stepped = modules.add(lambda slots: slots[..., -x.shape[-1] :], slots, route, c)
        h, cell = torch.where(active, stepped, x).chunk(2, -1)
        h = torch.where(active, h + self.attend(torch.where(active, h, h.detach())), h)
        return torch.cat([h, cell], -1)

    def everyone(self, k: int, batch: int) -> mb.Routing:
        if batch not in self.all:
            index = torch.arange(k).view(k, 1, 1).expand(k, batch, 1)
            self.all[batch] = mb.Routing(index=index, host=tuple((j,) for j in range(k) for _ in range(batch)))
        return self.all[batch]

    def attend(self, h: Tensor) -> Tensor:
        qkv = (h @ self.qkv).unflatten(-1, (3, self.heads, -1))  # (k, b, 3, heads, d_k)
        q, k, v = qkv.permute(2, 1, 3, 0, 4)  # each (b, heads, k, d_k)
        scores = k @ q.mT / math.sqrt(q.shape[-1])  # (b, heads, k, k), queries last: quicker so than softmax(−1)
        o = (scores.softmax(-2).mT @ v).permute(2, 0, 1, 3).flatten(2)  # (k, b, heads · d_k)
        gate, out = self.out(o).chunk(2, -1)
        return gate.sigmoid() * out.tanh()


class RIM(nn.Module):
    """The states h of all cells, (b, t, k·d), for a sequence (b, t, e)."""

    def __init__(self, inputs: int, hidden: int, k: int, active: int, keys: int = 64):
        super().__init__()
        self.k, self.size = k, hidden // k
        attended = 4 * self.size
        cells = {f"cell{j}": Cell(attended, self.size) for j in range(k)}
        router = NullAttention(k, active, inputs, self.size, keys)
        self.step = mb.Modular(None, cells, router, Communicate(k, inputs, attended, self.size))

    def forward(self, x: Tensor) -> Tensor:
        state, hidden = x.new_zeros(self.k, len(x), 2 * self.size), []
        for now in x.unbind(1):
            state = self.step.run(None, state, mb.Context(arguments={"input": now}))
            hidden.append(state[..., : self.size])
        return torch.stack(hidden).permute(2, 0, 1, 3).flatten(2)


class LSTM(nn.Module):
    """The baseline: as many hidden units in one piece."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def model(core: nn.Module, inputs: int, hidden: int, dropout: float) -> nn.Sequential:
    """Tokens (b, t) to logits (b, t, 10): embedding, recurrent core, linear; initialised as the official code does."""
    embedding, head = nn.Embedding(MARKER + 1, inputs), nn.Linear(hidden, MARKER + 1)
    return nn.Sequential(embedding, nn.Dropout(dropout), core, nn.Dropout(dropout), head)


def recall(net: nn.Module, batch: int, digits: int, blanks: int) -> tuple[float, float, float]:
    """(cross-entropy of all steps, cross-entropy of the digits, their accuracy) on fresh sequences."""
    tokens, targets = copying(batch, digits, blanks, torch.Generator().manual_seed(10_000 + blanks))
    net.eval()
    with torch.no_grad():
        logits = net(tokens)
    net.train()
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    hit = (logits[:, -digits:].argmax(-1) == targets[:, -digits:]).float()
    return each.mean().item(), each[:, -digits:].mean().item(), hit.mean().item()


def train(net: nn.Module, seed: int, args: argparse.Namespace, say: Callable[[str], None]) -> list[float]:
    """Adam on fresh sequences, its rate falling to zero as a cosine; the loss of each step."""
    generator, losses = torch.Generator().manual_seed(seed), []
    optimiser = torch.optim.Adam(net.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    for step in range(1, args.steps + 1):
        blanks = int(torch.randint(args.blanks[0], args.blanks[-1] + 1, (), generator=generator))
        tokens, targets = copying(args.batch, args.digits, blanks, generator)
        loss = F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if step % args.log == 0:
            near, far = (recall(net, 8 * args.batch, args.digits, n * args.blanks[-1])[1] for n in (1, 4))
            say(f"step {step}: loss {sum(losses[-args.log :]) / args.log:.4f}, digits {near:.4f}, at 4 T {far:.4f}")
    return losses


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--blanks", type=int, nargs="+", default=[10, 20], help="T, or from … to; tested at it and 4 ×")
    parser.add_argument("--digits", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=120, help="units, of all cells together and of the LSTM")
    parser.add_argument("--inputs", type=int, default=32, help="width of the embedding")
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--dropout", type=float, default=0.0, help="the official 0.5 is for 600 units")
    parser.add_argument("--log", type=int, default=250)
    parser.add_argument("--only", choices=["RIM", "LSTM"])
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds, args.steps, args.log, args.batch, args.digits, args.blanks, args.hidden = [0], 10, 10, 8, 4, [3], 48
    torch.set_num_threads(1)
    rows, begun = [], time.time()
    for seed in args.seeds:
        for name in [args.only] if args.only else ["RIM", "LSTM"]:
            torch.manual_seed(seed)
            rim = lambda: RIM(args.inputs, args.hidden, args.cells, args.active)
            core = rim() if name == "RIM" else LSTM(args.inputs, args.hidden)
            net = model(core, args.inputs, args.hidden, args.dropout)
            say = lambda text, who=f"{name}, seed {seed}": print(
                f"{who}, {time.time() - begun:.0f} s: {text}", flush=True
            )
            losses = train(net, seed, args, say)
            near, far = (recall(net, 8 * args.batch, args.digits, n * args.blanks[-1]) for n in (1, 4))
            size = sum(p.numel() for p in net.parameters())
            rows.append({"name": name, "seed": seed, "size": size, "losses": losses, "near": near, "far": far})
    print("\ncross-entropy of all steps | of the digits | accuracy of the digits, at T and at 4 T, in nats")
    for row in rows:
        figures = "    ".join(f"{a:.4f} | {b:.4f} | {hit:.3f}" for a, b, hit in (row["near"], row["far"]))
        print(f"{row['name']:4}  seed {row['seed']}  {row['size']:7,} parameters    {figures}")
    return rows


if __name__ == "__main__":
    main()
