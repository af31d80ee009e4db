"""A recording as plain data, for files and for the report."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _measures as measures
from ._recording import Recording

PARTS = 12  # of time, at most
FEW = 4  # sites that are told one by one over time
MOST = 12  # tokens of a module


def facts(
    recordings: Sequence[Recording], labels: Sequence[str] | None = None, decode: Callable[[int], str] = str
) -> dict[str, list[Any]]:
    """{routing, use, collapse, figures, over_time, tokens}, as a run's facts have them.

    labels: those that are shown, "" being all examples; by default every one there is, and "" where there is none.
    decode: a token id as text. Recordings without a call are left out.
    """
    out: dict[str, list[Any]] = {key: [] for key in ("routing", "use", "collapse", "figures", "over_time", "tokens")}
    for recording in recordings:
        if not recording.calls:
            continue
        shown = list(labels if labels is not None else recording.labels()) or [""]
        out["routing"] += [row for row in recording.rows() if row["label"] in shown]
        out["figures"] += [row for row in recording.metrics() if row["label"] in shown]
        table = recording.table(label="")
        shares = zip(table.modules, table.use, strict=True)
        out["use"] += [{"bay": recording.bay, "module": m, "share": float(s)} for m, s in shares]
        out["collapse"] += recording.alarms()
        out["over_time"] += _over_time(recording)
        out["tokens"] += _tokens(recording, decode)
    return out


def _over_time(recording: Recording) -> list[dict[str, Any]]:
    """The use of modules in up to a dozen parts of the recording: of all sites, and of each if they are few."""
    sites = recording.sites()
    out = []
    for site in [None, *(sites if 1 < len(sites) <= FEW else ())]:
        windows = recording.over_time(site)
        if len(windows) < 2:
            continue
        several = np.array_split(np.arange(len(windows)), min(PARTS, len(windows)))
        counts = [sum(windows[i][2].counts[0] for i in some) for some in several]
        calls = [[windows[some[0]][0], windows[some[-1]][1]] for some in several]
        shares = [measures.use(count).tolist() for count in counts]
        modules = windows[0][2].modules
        out.append({"bay": recording.bay, "site": site, "modules": modules, "calls": calls, "shares": shares})
    return out


def _tokens(recording: Recording, decode: Callable[[int], str]) -> list[dict[str, Any]]:
    """The tokens that go to each module more than others do, over all sites and at each if they are few."""
    sites = recording.sites()
    out = []
    for site in [None, *(sites if 1 < len(sites) <= FEW else ())]:
        found = recording.tokens(site)
        total = sum(counter.total() for counter in found.values())
        if not total:
            continue
        often = sum(found.values(), start=type(next(iter(found.values())))())
        rows = []
        for module, counter in found.items():
            part = counter.total() / total
            # How many more than if the module had its share of every token: rare tokens do not come first by chance.
            more = sorted(counter, key=lambda i: (part * often[i] - counter[i], i))
            best = [i for i in more[:MOST] if counter[i] > part * often[i]]
            said = [[decode(i), counter[i], often[i]] for i in best]
            rows.append({"module": module, "share": part, "tokens": said})
        out.append({"bay": recording.bay, "site": site, "positions": total, "modules": rows})
    return out
