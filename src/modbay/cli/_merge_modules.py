"""`modbay merge` of modules: one module of several that were saved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..attach import Bay, bays, load
from ..errors import ConfigError, ModbayError
from ._merge import spread
from ._say import console, fail


def are_modules(models: Sequence[str]) -> bool:
    """Whether all of these are folders of modules, as `bay.save` makes them."""
    return bool(models) and all((Path(model) / "module.json").is_file() for model in models)


def run(
    models: list[str], flags: dict[str, Any], each: dict[str, list[str]], sets: list[str], out: Path | None,
    overwrite: bool, dry: bool, as_json: bool,
) -> None:  # fmt: skip
    """Merge, save the module that was made, and print the report."""
    try:
        folders = [Path(model).resolve() for model in models]
        bay = opened(folders, flags.pop("base_model"))
        asked = arguments(flags, each, sets, len(folders))
        name, home = target(folders, out, bay.state.name)
        if (home / bay.state.name / name).exists() and not overwrite:
            raise ConfigError(f"--out: {home / bay.state.name / name} is there already; --overwrite replaces it.")
        which = [folder.name for folder in folders]
        weights = asked.pop("weights", None)
        if name in bay.names():
            if name in which:
                raise ConfigError(f"--out: {name!r} is one of those that are merged; choose another name.")
            bay.remove(name)
        report = bay.merge(name, which if weights is None else dict(zip(which, weights, strict=True)), **asked)
        written = None if dry else bay.save(home, name) / name
    except ModbayError as error:
        fail(str(error))
    if as_json:
        print(json.dumps({"folder": written and str(written), **report.as_dict()}, indent=1, ensure_ascii=False))
        return
    console().print(str(report), soft_wrap=True, markup=False, highlight=False)
    if written is not None:
        console().print(f"{written}/ holds the merged module.", soft_wrap=True)


def opened(folders: Sequence[Path], base: str | None) -> Bay:
    """The bay of these modules, on the model that they were made on: a run's own, or the base that is named."""
    homes = {folder.parent for folder in folders}
    if len(homes) > 1:
        raise ConfigError(
            f"MODELS: modules of one bay are merged, and these are of {', '.join(sorted(map(str, homes)))}. Load the "
            f"others into one bay first: bay.load(FOLDER, NAME, add=True), bay.merge(…)."
        )
    path = homes.pop()
    if not (path / "bay.json").is_file():
        raise ConfigError(f"MODELS: {path} is no folder of a bay: it has no bay.json. Merge what bay.save wrote.")
    if base is None and (path.parents[1] / "network.json").is_file():
        from .. import training

        model: Any = training.open_run(path.parents[1]).network().model
        return bays(model)[path.name]
    if base is None:
        raise ConfigError(f"--base is wanted: the model that the modules in {path} were made on, a folder.")
    return load(model_of(base), path.parent)[path.name]


def model_of(base: str) -> Any:
    """A transformers model, of the class that its config says."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        return cls.from_pretrained(base, config=config).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--base {base}: it can't be opened as a transformers model ({error}).") from error


def arguments(flags: dict[str, Any], each: dict[str, list[str]], sets: Sequence[str], n: int) -> dict[str, Any]:
    """What `bay.merge` is to be given; raises ConfigError for what is of checkpoints alone."""
    asked: dict[str, Any] = {}
    method = flags.pop("merge_method") or "linear"
    seed = flags.pop("seed")
    odd = [name for name, value in flags.items() if value]
    if odd:
        raise ConfigError(f"{', '.join(f'--{name}' for name in odd)}: of checkpoints, not of modules.")
    if method.startswith("dare_"):
        method, asked["elect"] = "dare", "mass" if method == "dare_ties" else None
    asked |= {"method": method} | ({} if seed is None else {"seed": seed})
    if each["weight"]:
        asked["weights"] = spread("weight", each["weight"], n)
    if each["density"]:
        densities = set(spread("density", each["density"], n))
        if len(densities) > 1:
            raise ConfigError(f"--density {','.join(each['density'])}: modules have one density together.")
        asked["density"] = densities.pop()
    for one in sets:
        name, equals, value = one.partition("=")
        if not equals:
            raise ConfigError(f"--set {one}: NAME=VALUE is wanted, the value in YAML; --set rank=16")
        asked[{"lambda": "scale", "normalize": "normalise"}.get(name, name)] = yaml.safe_load(value)
    return asked


def target(folders: Sequence[Path], out: Path | None, bay: str) -> tuple[str, Path]:
    """(the new module's name, the folder with its bay's): OUT/BAY/NAME, or NAME beside those that are merged."""
    if out is None:
        return "+".join(folder.name for folder in folders), folders[0].parents[1]
    out = out.resolve()
    if out.parent.name == bay:
        return out.name, out.parents[1]
    return "+".join(folder.name for folder in folders), out
