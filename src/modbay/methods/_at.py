"""Where modules go: `at` as text, and where it is if nothing is said."""

import re
from typing import Any

from torch import nn

from .. import seams
from ..core import base_type
from ..errors import ConfigError
from ..modules import LoRA
from ..seams import Role

ROLE = re.compile(r"(?:mb\.)?role\.([\w.]+)")


def default_kind() -> LoRA:
    """What a module is if nothing is said: LoRA of rank 8, the factor α/r being 2."""
    return LoRA(8, alpha=16)


def place(said: Any) -> Any:
    """`at` for text: "role.ffn" or "mb.role.ffn" is a role, other text a pattern; a list item by item.

    Raises ConfigError for a role that there is not.
    """
    if isinstance(said, (list, tuple)):
        return [place(one) for one in said]
    role = ROLE.fullmatch(said) if isinstance(said, str) else None
    if role is None:
        return said
    found: Any = seams.role
    try:
        for part in role[1].split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ConfigError(f"at={said!r}: {error}.") from None
    return found


def default_at(model: nn.Module) -> list[Role]:
    """The Linears of query and value (or the fused one of all three) and of the feed-forward part, by role.

    Raises ConfigError where a model's structure leaves one of them in doubt: nothing is guessed, nothing left out.
    """
    roles = seams.find_roles(model)
    attention = ["qkv"] if roles["qkv"] and not roles["query"] else ["query", "value"]
    wanted = [*attention, "ffn_in", "ffn_out"]
    unsure = [name for name in wanted if not roles[name]]
    if unsure:
        why = {"; ".join(roles.doubts[name]) or "nothing in its structure is recognised as such" for name in unsure}
        raise ConfigError(
            f"at: the default sites of {base_type(model).__name__} are in doubt ({', '.join(unsure)}: "
            f"{'; '.join(sorted(why))}). `modbay inspect MODEL` lists its layers and roles: say at as a role or a "
            f'name pattern of them, or a list of these, at: [role.ffn, "*.layer.*.value"].'
        )
    return [Role(name) for name in wanted]


def whole(model: nn.Module) -> str:
    """The base as one site: the part `trunk` of a network that has its head beside it, or else the model itself."""
    return "trunk" if "trunk" in model._modules else ""
