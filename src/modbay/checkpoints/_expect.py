"""What the figures of a merge mean, in sentences."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._explain import Explanation

MOST = 3  # pairs that are told of one by one
UNEVEN = 3.0  # norms of two task vectors
FAR = 0.5  # of the base's norm: a fine-tune changes a few hundredths
SPREAD = 0.1  # of shares, between layers
SMALL = 0.005  # of all numbers: layers below are no finding


def words(e: "Explanation") -> list[str]:
    """The findings, in the order in which they matter."""
    said = e.figures(e.every)
    live = [one for one in said["models"] if one["norm"]]
    out = [f"{one['name']} is the base itself: it adds nothing." for one in said["models"] if not one["norm"]]
    if e.base is None:
        return out + _apart(said["pairs"], len(said["models"]))
    out += _pairs(said["pairs"])
    out += _sizes(live)
    out += _trimmed(live, e.method)
    out += _merged(e, said["all"], live)
    out += _where(e)
    return out


def _apart(pairs: list[dict[str, Any]], n: int) -> list[str]:
    """Without a base there are distances alone."""
    out = [
        f"No base was given, so differences are from the mean of the models, and {'both' if n == 2 else 'all'} point "
        f"away from it whatever they are. Give --base, what they were made from: signs and cosines mean something then."
    ]
    for one in _told(pairs, "apart"):
        a, b = one["of"]
        far = one["apart"]
        means = (
            "equal" if far == 0 else
            "near, as fine-tunes of one model are: averages of such models mostly work" if far < FAR / 5 else
            "some way from each other: score points between them before the average is trusted" if far < FAR else
            "far from each other, as trainings from different starts are: their average is mostly worse than either. "
            "Match their units first (modbay.merging.match_weights), or merge fine-tunes of one model"
        )  # fmt: skip
        out.append(f"{a} and {b} are {per_cent(far)} of the mean's norm apart: {means}.")
    return out


def _told(pairs: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """All pairs where they are few; else those with the least and the most."""
    known = sorted((one for one in pairs if one[key] is not None), key=lambda one: one[key])
    return known if len(known) <= MOST else [known[0], known[-1]]


def _pairs(pairs: list[dict[str, Any]]) -> list[str]:
    """Those of one reading in one sentence."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in pairs:
        if one["cosine"] is not None:
            found.setdefault(_reading(one["cosine"], one["mass_differ"]), []).append(one)
    out = []
    for (signs, means), several in found.items():
        who = several_of([f"{a} and {b}" for a, b in (one["of"] for one in several)])
        if not signs:
            out.append(f"{who} {means}.")
            continue
        shares, cosines = [one["mass_differ"] for one in several], [one["cosine"] for one in several]
        out.append(
            f"{who} disagree in sign on {span(shares, per_cent)} of the mass that both change, {signs}; cosine "
            f"{span(cosines, two)}: {means}."
        )
    return out


def _reading(cosine: float, mass: float | None) -> tuple[str, str]:
    """(how the signs compare with chance, what to expect)."""
    if mass is None:
        return "", "change no entry in common: they add up without any conflict"
    signs = (
        "as unrelated vectors do (50 %)" if 0.45 <= mass <= 0.55 else
        "less than unrelated vectors do (50 %)" if mass < 0.45 else
        "more than unrelated vectors do (50 %)"
    )  # fmt: skip
    means = (
        "they learnt much the same: a sum counts it twice, so let weights add up to 1" if cosine >= 0.5 else
        "they share a part, which a sum counts twice" if cosine >= 0.15 else
        "nearly at right angles, so expect a sum to leave each most of what it learnt" if cosine > -0.15 else
        "they pull apart: what the merge takes from one it undoes in the other"
    )  # fmt: skip
    return signs, means


def _sizes(live: list[dict[str, Any]]) -> list[str]:
    out = []
    if len(live) > 1:
        small, large = min(live, key=lambda one: one["norm"]), max(live, key=lambda one: one["norm"])
        ratio = large["norm"] / small["norm"]
        if ratio >= UNEVEN:
            out.append(
                f"{large['name']} changes {ratio:.1f} times as much as {small['name']}: its sign wins nearly wherever "
                f"both change. A larger weight for {small['name']} evens that out."
            )
    for one in live:
        if one["relative"] is not None and one["relative"] >= FAR:
            out.append(
                f"{one['name']} is {per_cent(one['relative'])} of the base's norm away from it, where a fine-tune is a "
                f"few per cent: is this the base that it was made from?"
            )
    return out


def _trimmed(live: list[dict[str, Any]], method: str) -> list[str]:
    told = [one for one in live if one["trimmed"] is not None]
    if not told:
        return []
    said = f"{'Drawing drops' if method.startswith('dare') else 'Trimming takes'} {_each(told, 'trimmed')} of the mass"
    if told[0]["outvoted"] is not None and len(told) > 1:
        said += f"; {_each(told, 'outvoted')} is left in and out-voted"
    return [f"{said}."]


def _each(models: list[dict[str, Any]], key: str) -> str:
    """`38 % (a), 41 % (b)`."""
    return several_of([f"{per_cent(one[key])} ({one['name']})" for one in models], ", ")


def _merged(e: "Explanation", whole: dict[str, Any], live: list[dict[str, Any]]) -> list[str]:
    out = []
    if whole["norm"] == 0 and live:
        return ["The merge changes nothing: weights are 0, or what was changed cancels."]
    if len(live) > 1 and whole["cancelled"] is not None and e.method not in ("ties", "dare_ties"):
        out.append(
            f"{per_cent(whole['cancelled'])} of the mass cancels in the sum, which is {per_cent(whole['kept'])} as "
            f"long as its parts end to end (at right angles {per_cent(whole['unrelated'])})."
        )
    for one in live:
        along, weight, name = one["along"], one["weight"], one["name"]
        if along is None or (weight is not None and weight <= 0):
            continue  # it was to be forgotten, or left out
        if along > 1.2:
            out.append(
                f"The merged change goes {along:.2f} times as far in {name}'s direction as {name}: it overshoots. "
                f"Expect better of smaller weights, or of --lambda {1 / along:.1f}."
            )
        elif along < 0.3:
            why = f" (its weight is {weight:.2f})" if weight is not None and weight < 0.3 else ""
            out.append(f"Little of {name} is left: the merged change goes {per_cent(along)} of its way{why}.")
    if whole["rounding"] is not None and whole["rounding"] >= 0.05:
        out.append(
            f"Rounding to {e.dtype} adds an error of {per_cent(whole['rounding'])} of the merged change: "
            f"--dtype float32 keeps what is that small."
        )
    return out


def _where(e: "Explanation") -> list[str]:
    """Which layers differ from the rest."""
    out = []
    large = {name: one for name, one in e.layers.items() if one.numbers >= SMALL * e.every.numbers}
    shares = {name: one.whole()["mass_differ"] for name, one in large.items()}
    known = {name: share for name, share in shares.items() if share is not None}
    if len(known) > 1 and e.every.n > 1:
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        if known[high] - known[low] >= SPREAD:
            out.append(
                f"Signs differ most in {high} ({per_cent(known[high])} of its mass) and least in {low} "
                f"({per_cent(known[low])})."
            )
    moved = {name: one.whole()["relative"] for name, one in large.items()}
    far = {name: share for name, share in moved.items() if share}
    low, high = (min(far, key=far.__getitem__), max(far, key=far.__getitem__)) if far else ("", "")
    if far and far[high] >= 2 * far[low]:
        out.append(
            f"The merged change is largest in {high} ({per_cent(far[high])} of the base's norm there) and smallest in "
            f"{low} ({per_cent(far[low])})."
        )
    return out


def several_of(names: Sequence[str], joint: str = "; ", most: int = 6) -> str:
    """All of them, or the first few `and 9 more`."""
    return joint.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def span(values: Sequence[float], shown: Callable[[float], str]) -> str:
    """`48 %`, or `46 % to 51 %`."""
    low, high = shown(min(values)), shown(max(values))
    return low if low == high else f"{low} to {high}"


def per_cent(share: float | None) -> str:
    """`48 %`, `0.3 %`, `< 0.001 %`, `–`."""
    if share is None:
        return "–"
    x = 100 * share
    if 0 < abs(x) < 0.001:
        return "< 0.001 %"
    shown = f"{x:.0f}" if abs(x) >= 9.95 or x == 0 else f"{x:.1f}" if abs(x) >= 0.095 else f"{x:.1g}"
    return f"{shown} %".replace("-", "−")


def two(x: float | None) -> str:
    """Two decimals."""
    return "–" if x is None else f"{round(x, 2) + 0.0:.2f}".replace("-", "−")
