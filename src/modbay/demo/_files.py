"""What the demo leaves behind: its modules, and the little of their base that is not MiniLM's, to load all again."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import modbay as mb

from ._data import Utterance
from ._encode import Assistant, Row, collate, encoder, rows, tokenizer

OURS = ("mean", "scale", "head.weight", "head.bias")


def keep(folder: Path, base: Assistant, intents: Sequence[str], ways: dict[str, Assistant]) -> None:
    """Write the base's standardisation and head, the names of the intents, and each way's modules into a folder of its
    own."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: base.state_dict()[name].contiguous() for name in OURS}, folder / "assistant.safetensors")
    about = {"intents": list(intents), "layers": base.encoder.config.num_hidden_layers}
    (folder / "assistant.json").write_text(json.dumps(about, indent=1) + "\n")
    for name, model in ways.items():
        for bay in mb.bays(model).values():
            bay.save(folder / name)


def assistant(folder: str | Path) -> Assistant:
    """The demo's base, as it was when the modules in `folder` were trained: `mb.load` puts them on it."""
    about = json.loads((Path(folder) / "assistant.json").read_text())
    model = Assistant(encoder(about["layers"]), len(about["intents"]))
    model.load_state_dict(load_file(Path(folder) / "assistant.safetensors"), strict=False)
    model.intents = tuple(about["intents"])
    return model.eval()


@torch.no_grad()
def ask(model: Assistant, texts: Sequence[str], languages: Sequence[str]) -> list[str]:
    """The intents of some utterances, each in a language of its own: one mixed batch."""
    wanted = [
        Utterance(text.lower(), model.intents[0], language, "") for text, language in zip(texts, languages, strict=True)
    ]
    batch = collate(rows(wanted, model.intents, tokenizer()))
    said = model(batch.input_ids, batch.attention_mask, language=batch.language)
    return [model.intents[i] for i in said.argmax(dim=-1).tolist()]


@torch.no_grad()
def mixed(model: Assistant, chosen: Sequence[Row]) -> Tensor:
    """Logits of one batch with as many languages as `chosen` has."""
    batch = collate(chosen)
    return model(batch.input_ids, batch.attention_mask, language=batch.language)
