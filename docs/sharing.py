"""Modules that outlive the run that trained them: published, checked, mixed with others', and sent out again.

Two modules are trained on one base and published to a folder. Elsewhere they are loaded, and serve in one batch with a
LoRA that somebody trained with peft. One leaves as plain LoRA for an engine, another is folded into a checkpoint that
needs no modbay. It runs in seconds (`python docs/sharing.py`), on a base small enough to be trained here.
"""

# %% What is needed
import tempfile
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

import modbay as mb
from modbay.library import Library

torch.manual_seed(0)
place = Path(tempfile.mkdtemp())
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def rows(token, n=256):
    """Sequences of 8 tokens out of 20, and whether a token is among them: what a task is here."""
    ids = torch.randint(1, 20, (n, 8))
    ids[: n // 2][ids[: n // 2] == token] = 0
    ids[n // 2 :, 3] = token
    return ids, (ids == token).any(1).long()


def learn(model, parameters, token, label=None, steps=60):
    """Training, as anyone's loop has it; returns the accuracy on new rows."""
    more = {} if label is None else {"task": label}
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        ids, target = rows(token, 64)
        optimiser.zero_grad()
        F.cross_entropy(model(ids, **more).logits, target).backward()
        optimiser.step()
    model.eval()
    ids, target = rows(token)
    with torch.no_grad():
        return (model(ids, **more).logits.argmax(1) == target).float().mean().item()


# %% 1. A base, as it lies on disk
config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
BertForSequenceClassification(config).save_pretrained(place / "base")


def base():
    return BertForSequenceClassification.from_pretrained(place / "base").eval()


# %% 2. Two modules are trained on it: the base does not move, and neither knows of the other
model = base()
kinds = {name: {"*.query": mb.LoRA(4), "*.value": mb.LoRA(4), "classifier": mb.Full()} for name in ("seven", "nine")}
bay = mb.attach(model, modules=kinds, name="task")
accuracy = {name: learn(model, bay.parameters(name), token, name) for name, token in (("seven", 7), ("nine", 9))}
print({name: round(value, 3) for name, value in accuracy.items()})

# %% 3. They are published: a folder each, with what they were trained for, what they reached, and a hash of all of it
about = {
    name: {"labels": {"task": [name]}, "metrics": {"accuracy": value}, "licence": "CC0-1.0"}
    for name, value in accuracy.items()
}
bay.save(place / "run", about=about)
shelf = Library(place / "library")
shelf.add(place / "run")
assert not shelf.verify(model=base())  # hashes, finite values, the base that they were made on: nothing is wrong
assert [entry.name for entry in shelf.search(labels={"task": "nine"}, metrics=["accuracy>0.5"])] == ["task/nine"]

# %% 4. Meanwhile somebody trains a LoRA with peft
theirs = peft.get_peft_model(base(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
learn(theirs, [p for p in theirs.parameters() if p.requires_grad], 11)
theirs.save_pretrained(place / "eleven")

# %% 5. Elsewhere: ours are loaded in one call, theirs is added, and all of them serve in one batch
elsewhere = base()
shared = mb.load(elsewhere, place / "library")["task"]
shared.load(place / "eleven", add=True)
ids = torch.cat([rows(token, 2)[0] for token in (7, 9, 11, 13)])
tasks = [name for name in ("seven", "nine", "eleven", None) for _ in range(2)]  # None: the base alone
with torch.no_grad():
    mixed = elsewhere(ids, task=tasks).logits
    assert_close(mixed[:2], model(ids[:2], task="seven").logits, **CLOSE)
    assert_close(mixed[4:6], theirs(ids[4:6]).logits, **CLOSE)
    assert_close(mixed[6:], base()(ids[6:]).logits, **CLOSE)

# %% 6. On another base they are refused, by name of what differs
other = base()
with torch.no_grad():
    other.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
try:
    mb.load(other, place / "library")
except mb.errors.BaseMismatch as error:
    print(str(error)[:160], "…")
else:
    raise AssertionError("a module must not go onto another base unnoticed")

# %% 7. One leaves as plain LoRA, as engines load it: its error is told, and its head lies beside it
errors = shared.export(place / "served", "seven", format="lora")
assert max(errors.values()) == 0  # it is of low rank
served = peft.PeftModel.from_pretrained(base(), place / "served").eval()
head = load_file(place / "served" / "heads.safetensors")
with torch.no_grad():
    hidden = served.get_base_model().bert(ids).pooler_output
    logits = F.linear(hidden, head["classifier.weight"], head["classifier.bias"])
    assert_close(logits, elsewhere(ids, task="seven").logits, **CLOSE)

# %% 8. Another is folded, into a checkpoint that needs no modbay
with torch.no_grad():
    wanted = elsewhere(ids, task="nine").logits
shared.fold("nine").detach(keep=True)
elsewhere.save_pretrained(place / "nine")
plain = BertForSequenceClassification.from_pretrained(place / "nine").eval()
with torch.no_grad():
    assert_close(plain(ids).logits, wanted, **CLOSE)
print("published, checked, mixed, exported, folded: all equal")
