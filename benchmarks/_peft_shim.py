"""peft's names over modbay's verbs: a plugin of pytest under which peft's own tests run on modbay's modules.

    pytest -p _peft_shim --record FILE.jsonl tests/test_mixed.py     # benchmarks/peft_tests.py does it

peft makes each adapter, on a copy of the bare model, and writes it; modbay reads that checkpoint onto the model itself,
and from there on all is modbay's: forward, set_adapter (use), disable_adapter (disable), merge_adapter (fold), unload
(detach), delete_adapter (remove), save_pretrained (export), from_pretrained (load). Adapters at sites that a bay has
join it; others open a bay. Configs and model cards are peft's own, and errors are said in peft's words. What modbay has
no reader or verb for is skipped, and says so: "n/a: …".
"""

import copy
import json
import sys
import tempfile
import types
import warnings
from collections import namedtuple
from contextlib import ExitStack, contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import datasets
import huggingface_hub
import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

import modbay as mb
from modbay.errors import BayError, FileError, ModbayError

REAL = {name: getattr(peft, name) for name in ("get_peft_model", "PeftModel", "PeftConfig")}
FILES = ("adapter_config.json", "adapter_model.safetensors")
Result = namedtuple("Result", ["missing_keys", "unexpected_keys"])
USED = {"loads": 0}  # how often modbay was given a module: a test that never does proves nothing of it
UNKNOWN: dict[str, str] = {}  # types of peft's that modbay does not read, with what it said
INJECTED: WeakKeyDictionary = WeakKeyDictionary()


def not_applicable(why):
    pytest.skip(f"n/a: {why}")


def several(names):
    return [names] if isinstance(names, str) else list(names)


class Tuner(nn.Module):
    """`base_model` of peft's: the model, and modbay's verbs on it under peft's names."""

    prefix = "_bay"  # what the names of all that is an adapter's hold

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.peft_config, self.active, self.merged = {}, [], []
        self.disabled, self.off, self.twins = 0, ExitStack(), {}

    def __deepcopy__(self, memo):
        twin = Tuner(copy.deepcopy(self.model, memo))
        twin.peft_config = dict(self.peft_config)
        twin.active, twin.merged = list(self.active), list(self.merged)
        return twin.train(self.training)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args, adapter_names=None, **kwargs):
        if adapter_names is not None:
            kwargs |= self.labels(adapter_names)
        out = self.model(*args, **kwargs)
        if adapter_names is None:
            self.compare(out, *args, **kwargs)
        return out

    def compare(self, out, *args, **kwargs):
        """The first output of an adapter alone beside that of peft's own model, while nothing has been changed."""
        theirs, sums = self.twins.get(tuple(self.active), (None, None))
        if theirs is None or self.training or self.merged or self.disabled or sums != self.sums():
            return
        del self.twins[tuple(self.active)]
        with torch.no_grad():
            wanted = theirs.eval()(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.isfinite().all():
            assert torch.allclose(out, wanted, atol=1e-4, rtol=1e-4), (
                f"modbay is not peft: {float((out - wanted).abs().max()):.2g} apart, of {float(wanted.abs().max()):.2g}"
            )

    def sums(self):
        return [float(tensor.double().sum()) for tensor in (*self.model.parameters(), *self.model.buffers())]

    def generate(self, *args, adapter_names=None, **kwargs):
        return self.model.generate(*args, **kwargs, **({} if adapter_names is None else self.labels(adapter_names)))

    def labels(self, names):
        """A module for each row, as each bay's keyword."""
        unknown = sorted({name for name in names if name != "__base__" and name not in self.peft_config})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        return {key: [name if name in bay.names() else None for name in names] for key, bay in self.bays().items()}

    # Adapters in and out

    def bays(self):
        return mb.bays(self.model)

    def bay(self, adapter):
        return next(bay for bay in self.bays().values() if adapter in bay.names())

    def bare(self):
        """A copy of the model as it was before any adapter."""
        twin = copy.deepcopy(self)
        twin.unfold()
        for bay in reversed(twin.bays().values()):
            bay.detach()
        return twin.model

    def make(self, adapter, config, **options):
        """An adapter of peft's making, by way of its checkpoint."""
        if adapter in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter}' already exists.")
        method = getattr(config, "peft_type", None)
        if method in UNKNOWN:
            not_applicable(UNKNOWN[method])
        theirs = REAL["get_peft_model"](self.bare(), config, adapter_name="default", **options)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.save_pretrained(folder)
            self.put(adapter, Path(folder), config)
        self.twins[(adapter,)] = theirs, self.sums()

    def put(self, adapter, folder, config, loaded=False):
        with tempfile.TemporaryDirectory() as parent, self.unfolded():
            path = Path(parent) / adapter
            path.mkdir()
            for name in FILES:
                if not (folder / name).exists():
                    not_applicable("pickled checkpoints")
                (path / name).write_bytes((folder / name).read_bytes())
            try:
                self.load(path)
            except FileError as error:
                why = str(error).replace(f"{path}", "FOLDER")
                if "is not one that modbay reads" in why:
                    UNKNOWN[config.peft_type] = f"{config.peft_type.value} is not one of modbay's kinds"
                    why = UNKNOWN[config.peft_type]
                not_applicable(why)
        for bay in self.bays().values():
            bay.in_state_dict()
        USED["loads"] += 1
        self.peft_config[adapter] = config
        self.active = self.active or [adapter]
        self.route()
        learns = not getattr(config, "inference_mode", False) and (loaded or adapter in self.active)
        self.set_requires_grad(adapter, learns)

    def load(self, path):
        for bay in self.bays().values():
            try:
                bay.load(path, add=True)
                return
            except BayError:  # it has not those sites
                continue
        mb.load(self.model, path, name=f"peft{len(self.bays())}")

    def write(self, adapter, folder):
        with self.unfolded():
            self.bay(adapter).export(folder, adapter)

    def delete_adapter(self, adapter_name):
        names = several(adapter_name)
        merged = [name for name in names if name in self.merged]
        if merged:
            raise ValueError(f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first.")
        lost = [name for name in names if name not in self.peft_config]
        if lost:
            raise ValueError(f"Adapter {lost[0]} does not exist")
        for name in names:
            self.bay(name).remove(name)
            del self.peft_config[name]
        self.set_adapter([name for name in self.active if name not in names] or list(self.peft_config)[:1])

    def known(self, *names):
        lost = [name for name in names if name not in self.peft_config]
        if lost:
            raise ValueError(f"Adapter(s) {lost} not found, available adapters: {list(self.peft_config)}")

    # Which are at work

    def set_adapter(self, adapter_name, inference_mode=False):
        names = several(adapter_name)
        self.known(*names)
        self.active = names
        self.route()
        for name in self.peft_config:
            self.set_requires_grad(name, name in names and not inference_mode)

    def route(self):
        for bay in self.bays().values():
            own = [name for name in self.active if name in bay.names()]
            bay.use(*(own or [None]))

    def set_requires_grad(self, adapter_names, requires_grad=True):
        for name in several(adapter_names):
            bay = self.bay(name)
            (bay.unfreeze if requires_grad else bay.freeze)(name)

    @property
    def active_adapters(self):
        return list(self.active)

    @property
    def active_adapter(self):
        return self.active[0] if len(self.active) == 1 else list(self.active)

    @contextmanager
    def disable_adapter(self):
        self.unfold()
        with ExitStack() as stack:
            for bay in self.bays().values():
                stack.enter_context(bay.disable())
            self.disabled += 1
            try:
                yield
            finally:
                self.disabled -= 1

    @property
    def has_active_enabled_adapter(self):
        return bool(self.active) and not self.disabled

    def disable_adapter_layers(self):
        self.off.enter_context(self.disable_adapter())

    def enable_adapter_layers(self):
        self.off.close()

    # Into the weights

    def fold(self, names, safe=False):
        self.unfold()
        self.known(*names)
        self.merged = names
        for bay in self.bays().values():
            own = [name for name in names if name in bay.names()]
            if own:
                bay.fold(*own)
        if safe and not all(bool(torch.isfinite(p).all()) for n, p in self.model.named_parameters() if "_bay" not in n):
            self.unfold()
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")

    def folded(self):
        return [bay for bay in self.bays().values() if set(bay.names()) & set(self.merged)]

    def unfold(self):
        for bay in reversed(self.folded()):
            bay.unfold()
        self.merged = []

    @contextmanager
    def unfolded(self):
        names = list(self.merged)
        self.unfold()
        yield
        if names:
            self.fold(names)

    def merge_adapter(self, adapter_names=None, safe_merge=False):
        new = [name for name in several(adapter_names or self.active) if name not in self.merged]
        if not new:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        self.fold([*self.merged, *new], safe_merge)

    def unmerge_adapter(self):
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.unfold()

    def merge_and_unload(self, progressbar=False, safe_merge=False, adapter_names=None):
        self.fold(several(adapter_names or self.active), safe_merge)
        folded = self.folded()
        for bay in reversed(self.bays().values()):
            bay.detach(keep=bay in folded)
        return self.model

    def unload(self):
        self.unfold()
        for bay in reversed(self.bays().values()):
            bay.detach()
        return self.model

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="svd", svd_rank=None, **_):
        self.known(*adapters)
        if combination_type not in ("cat", "svd"):
            not_applicable(f"add_weighted_adapter({combination_type!r}): by peft's own formula")
        bay = self.bay(adapters[0])
        ranks = {self.peft_config[name].r for name in adapters}
        rank = None if combination_type == "cat" else svd_rank or max(ranks)
        try:
            bay.merge(adapter_name, dict(zip(adapters, weights, strict=True)), rank=rank)
        except BayError as error:
            not_applicable(f"a merge of adapters at different sites ({error})")
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapters[0]])
        self.route()

    # What tests look at

    def modules(self):
        yield from super().modules()
        yield from self.layers()

    def layers(self):
        """Each site as a layer of peft's: one for each kind that is there, with its modules in a dict."""
        for bay in self.bays().values():
            for site, modular in bay.modulars.items():
                there: dict = {}
                for name in bay.names():
                    part = modular.parts._modules.get(name)
                    if part is not None:
                        there.setdefault(type(part.kind).__name__, {})[name] = part
                for kind, parts in there.items():
                    layer = LAYERS.setdefault(kind, type(f"{kind}Layer", (Layer,), {}))
                    view = layer(self, site, modular, parts)
                    yield view
                    yield view._parts

    def get_nb_trainable_parameters(self):
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, learns in counts if learns), sum(n for n, _ in counts)


LAYERS: dict[str, type] = {}


class Layer(nn.Module, BaseTunerLayer):
    """A site of a bay, read as a layer of peft's; it owns nothing."""

    def __init__(self, tuner, site, modular, parts):
        super().__init__()
        widths = (modular.site.features(way) for way in ("inputs", "outputs"))
        self.__dict__ |= {"tuner": tuner, "_parts": nn.ModuleDict(parts)}
        self.__dict__ |= dict(zip(("in_features", "out_features"), widths, strict=True))
        bare = modular.site.bare  # a parameter by itself
        self.__dict__["base_layer"] = modular.site.module if bare else tuner.model.get_submodule(site)

    def get_base_layer(self):
        return self.base_layer

    @property
    def active_adapters(self):
        return [name for name in self.tuner.active if name in self._parts]

    @property
    def merged_adapters(self):
        return [name for name in self.tuner.merged if name in self._parts]

    @property
    def merged(self):
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self):
        return self.tuner.disabled > 0

    def _all_available_adapter_names(self):
        return list(self._parts)


class PeftModel(nn.Module):
    """peft's model: a Tuner, and files."""

    _get_peft_specific_model_tags = REAL["PeftModel"]._get_peft_specific_model_tags  # for the model card

    def __init__(self, model, config, adapter_name="default", **options):
        super().__init__()
        self.base_model = Tuner(model)
        if config is not None:
            self.base_model.make(adapter_name, config, **kept(options))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def __deepcopy__(self, memo):
        twin = type(self)(None, None)
        twin.base_model = copy.deepcopy(self.base_model, memo)
        return twin.train(self.training)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def modules(self):
        yield from super().modules()
        yield from self.base_model.layers()

    def add_adapter(self, adapter_name, peft_config, **options):
        self.base_model.make(adapter_name, peft_config, **kept(options))

    def get_base_model(self):
        return self.base_model.model

    @property
    def peft_type(self):
        return self.active_peft_config.peft_type

    @property
    def active_peft_config(self):
        return self.peft_config[self.active_adapters[0]]

    def push_to_hub(self, *args, **kwargs):
        not_applicable("needs the hub")

    def save_pretrained(self, save_directory, safe_serialization=True, selected_adapters=None, **_):
        if not safe_serialization:
            not_applicable("pickled checkpoints")
        for name in selected_adapters or list(self.peft_config):
            folder = Path(save_directory) / ("" if name == "default" else name)
            self.base_model.write(name, folder)
        REAL["PeftModel"].create_or_update_model_card(self, str(save_directory))

    @classmethod
    def from_pretrained(cls, model, model_id, adapter_name="default", is_trainable=False, config=None, **_):
        made = cls(model, None)
        made.load_adapter(model_id, adapter_name, is_trainable, config=config)
        return made

    def load_adapter(self, model_id, adapter_name, is_trainable=False, config=None, **_):
        if not Path(model_id).is_dir():
            not_applicable("needs the hub")
        config = REAL["PeftConfig"].from_pretrained(str(model_id)) if config is None else config
        config.inference_mode = not is_trainable
        self.base_model.put(adapter_name, Path(model_id), config, loaded=True)
        if not is_trainable:
            self.eval()
        return Result([], [])

    def print_trainable_parameters(self):
        print("trainable params: {:,d} || all params: {:,d}".format(*self.get_nb_trainable_parameters()))


class PeftMixedModel(PeftModel):
    """The same: every model of modbay's may be mixed."""


def kept(options):
    return {key: value for key, value in options.items() if key == "autocast_adapter_dtype"}


def get_peft_model(model, peft_config, adapter_name="default", mixed=False, **options):
    return (PeftMixedModel if mixed else PeftModel)(model, peft_config, adapter_name, **options)


def inject_adapter_in_model(peft_config, model, adapter_name="default", **options):
    tuner = INJECTED.setdefault(model, Tuner(model))
    tuner.make(adapter_name, peft_config)
    return model


def tuner_of(model):
    found = getattr(model, "base_model", None)
    return found if isinstance(found, Tuner) else INJECTED[model]


def get_peft_model_state_dict(model, state_dict=None, adapter_name="default", **_):
    with tempfile.TemporaryDirectory() as folder:
        tuner_of(model).write(adapter_name, Path(folder))
        return load_file(Path(folder) / FILES[1])


def set_peft_model_state_dict(model, peft_model_state_dict, adapter_name="default", **_):
    tuner = tuner_of(model)
    with tempfile.TemporaryDirectory() as folder:
        tuner.write(adapter_name, Path(folder))
        save_file({key: t.contiguous() for key, t in peft_model_state_dict.items()}, Path(folder) / FILES[1])
        config = tuner.peft_config.pop(adapter_name)
        tuner.bay(adapter_name).remove(adapter_name)
        tuner.put(adapter_name, Path(folder), config)
    return Result([], [])


@contextmanager
def hidden(model):
    """The model, its state dict as without any adapter."""
    tuner = tuner_of(model)
    for bay in tuner.bays().values():
        bay.in_state_dict(False)
    try:
        yield tuner.model
    finally:
        for bay in tuner.bays().values():
            bay.in_state_dict()


def get_base_model_state_dict(model):
    with hidden(model) as base:
        return base.state_dict()


def set_base_model_state_dict(model, state_dict, strict=True):
    with hidden(model) as base:
        return base.load_state_dict(state_dict, strict=strict)


for stand_in in (
    PeftModel, PeftMixedModel, get_peft_model, inject_adapter_in_model, get_peft_model_state_dict,
    set_peft_model_state_dict, get_base_model_state_dict, set_base_model_state_dict,
):  # fmt: skip
    setattr(peft, stand_in.__name__, stand_in)

huggingface_hub.file_download._hf_hub_download_to_cache_dir = lambda *args, **kwargs: not_applicable("needs the hub")
datasets.load_dataset = lambda *args, **kwargs: not_applicable("needs the hub")

# peft's tests import diffusers for tests that need a hub
DIFFUSERS = sys.modules.setdefault("diffusers", types.ModuleType("diffusers"))
DIFFUSERS.__dict__.update(StableDiffusionPipeline=object, __version__="0")


def pytest_addoption(parser):
    parser.addoption("--record", help="a file for what each test gave, one line of JSON a test")
    parser.addoption("--every", type=int, default=1, help="only each n-th test")


def pytest_collection_modifyitems(config, items):
    items[:] = items[:: config.getoption("--every")]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    USED["loads"] = 0
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
        return
    said, where = "", ""
    if call.excinfo is not None:
        error = call.excinfo.value
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, ModbayError):
            said = f"ModbayError.{said}"
        last = call.excinfo.traceback[-1]
        where = f"{last.path}:{last.lineno + 1}: {str(last.statement).strip()}"
    row = {"test": item.nodeid, "outcome": report.outcome, "said": said, "where": where, "loads": USED["loads"]}
    if record := item.config.getoption("--record"):
        with open(record, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
