"""How the commands on a finished run read --by and --value."""

from ..errors import ConfigError


def columns(by: list[str]) -> dict[str, str]:
    """LABEL or LABEL=COLUMN as {label: column}; raises ConfigError for a label given twice."""
    pairs = [one.partition("=") for one in by]
    labels = [label for label, *_ in pairs]
    twice = [label for label in labels if labels.count(label) > 1 or not label]
    if twice:
        raise ConfigError(f"--by {twice[0]}: each label is given once, as LABEL or LABEL=COLUMN.")
    return {label: column or label for label, _, column in pairs}


def values(value: list[str]) -> dict[str, str]:
    """LABEL=VALUE as {label: value}; raises ConfigError for what is none."""
    pairs = {label: said for label, _, said in (one.partition("=") for one in value)}
    bad = next((one for one in value if not all(one.partition("="))), None)
    if bad is not None:
        raise ConfigError(f"--value {bad}: LABEL=VALUE is wanted, such as language=pt.")
    return pairs
