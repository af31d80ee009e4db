"""Checkpoints of the hub, through huggingface_hub: `org/name`, `org/name@revision`; from its cache if offline."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError

PREFIX = "hf://"
PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
ID = re.compile(rf"({PART}/{PART})(?:@(\S+))?")
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "*.vocab", "*.bpe"]
BESIDE = ["*/*", "consolidated*", "*.fp16.safetensors", "*.bf16.safetensors"]  # other formats of the same weights


@dataclass(frozen=True)
class Repository:
    """A model of the hub, at a revision: a branch, a tag or a commit; None is its main branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")


def repository(said: str) -> Repository | None:
    """What `org/name@revision` names on the hub; None for a path. A folder beside goes first: `hf://` means the hub.

    `runs/a` is no model of the hub where there is a folder `runs`, so that a slip of the pen asks nobody.
    """
    match = ID.fullmatch(said.removeprefix(PREFIX))
    if match is None or (not said.startswith(PREFIX) and Path(said).parent.exists()):
        return None
    return Repository(match[1], match[2])


def fetch(one: Repository) -> tuple[Path, str | None]:
    """(the folder in huggingface_hub's cache, the commit); raises FileError, in one line, if it can't be had.

    What is in the cache is not fetched again; offline (HF_HUB_OFFLINE=1, or no network) the cache alone is asked.
    Tokens are huggingface_hub's: HF_TOKEN, or of `hf auth login`.
    """
    try:
        from huggingface_hub import errors, snapshot_download  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        raise FileError(f"{one}: a model of the hub needs huggingface_hub: pip install 'modbay[hf]'.") from None
    try:
        got = snapshot_download(one.name, revision=one.revision, allow_patterns=WANTED, ignore_patterns=BESIDE)
    except Exception as error:  # its own, its HTTP library's, and the disk's
        why = (
            "it is gated, or private: ask for access on its page, and set HF_TOKEN (or `hf auth login`)"
            if isinstance(error, errors.GatedRepoError) else
            "the hub has no such model, or it is private: check the name, or set HF_TOKEN (or `hf auth login`)"
            if isinstance(error, errors.RepositoryNotFoundError) else
            "the hub has no such revision: a branch, a tag or a commit is wanted"
            if isinstance(error, errors.RevisionNotFoundError) else
            "it is not, or not all of it, in the local cache, and the hub can't be reached, or is not to be "
            f"(HF_HUB_OFFLINE): with a network, `hf download {one.name}` puts it there"
            if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) else
            f"huggingface_hub could not get it ({type(error).__name__}: {_first(error)})"
        )  # fmt: skip
        raise FileError(f"{str(one)!r} is no folder here, and of the hub {why}.") from error
    folder = Path(got)
    return folder, folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _first(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "no reason given")
