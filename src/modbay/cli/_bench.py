"""`modbay bench`: benchmarks that judge routing."""

import json as encoder
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Benchmarks that judge routing.")

WAYS = ("monolithic", "modular", "joint", "operation", "ground-truth", "TopK", "Scouts")
HEADS = (
    "rules",
    "way",
    "error",
    "of the gap",
    "error × 2",
    "of the gap ",
    "collapse",
    "worst",
    "MI",
    "misaligned",
    "s",
)


@app.callback()
def _bench() -> None:
    """Benchmarks that judge routing."""


@app.command()
def modularity(
    family: Annotated[str, typer.Option("--family", help="The data and networks: mlp, mha or rnn.")] = "mlp",
    task: Annotated[str, typer.Option("--task", help="regression or classification.")] = "regression",
    rules: Annotated[list[int] | None, typer.Option("--rules", "-r", help="How many [2, 4, 8, 16].")] = None,
    way: Annotated[
        list[str] | None, typer.Option("--way", "-w", help="One of the paper's, or a router: TopK, '{TopK: {k: 2}}'.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each, of other data and weights.")] = 3,
    steps: Annotated[int | None, typer.Option("--steps", help="Of training.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Adam's.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Units of all modules together.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Sizes, steps and learning rate of the paper: days.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep each run here; go on where it stopped.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Processes [one a core].")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Is a modular architecture enough? Rules are known, so that every router can be held against ground truth.

    \b
    modbay bench modularity                                   a small grid: minutes on two cores
    modbay bench modularity -r 8 -w joint -w ground-truth -w '{TopK: {k: 2}}'
    modbay bench modularity --family rnn --out runs/rnn       the same command again goes on
    modbay bench modularity --way 'TopK@operation'            a router that sees the operation alone

    error: mean absolute error, or error rate; "× 2" on inputs of twice the scale. of the gap: what the way closes of
    the gap between joint scores (0) and ground truth (1). collapse 0 is balanced; MI of rules and modules, 1 is all;
    misaligned 0 is one module a rule. Mittal, Bengio and Lajoie, 2022 (arXiv 2206.02713).
    """
    from .. import bench
    from ..errors import ModbayError
    from ._progress import Shown
    from ._say import console, fail, table

    try:
        settings = bench.grid(
            rules or (2, 4, 8, 16), way or WAYS, seeds, family, task, paper, steps=steps, lr=lr, dim=width
        )
        with Shown().stage("Runs", len(settings)) as bar:
            note = lambda n, r: bar.step(n, f"{r['rules']} rules, {r['way']}, seed {r['seed']}: {r['score']:.4f}")
            results = bench.modularity(settings, out, jobs, note)
    except ModbayError as error:
        fail(str(error))
    except KeyboardInterrupt:
        kept = f"the same command goes on from {out}" if out else "--out FOLDER keeps what was done"
        typer.echo(f"modbay: stopped; {kept}.", err=True)
        raise SystemExit(130) from None
    rows = bench.standings(results)
    if json:
        print(encoder.dumps(rows, indent=1))
    else:
        console().print(table(HEADS, cells(rows), right=[head for head in HEADS if head != "way"]))


def cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows for people: means ± deviations over seeds."""
    made = []
    for row in rows:
        scores = [_with(row, name) for name in ("score", "score_ood")]
        closed = ["" if row[f"{n}_closed"] is None else f"{row[f'{n}_closed']:.2f}" for n in ("score", "score_ood")]
        judged = [_with(row, name, 2) for name in ("collapse", "worst", "information", "alignment")]
        both = zip(scores, closed, strict=True)
        made.append((str(row["rules"]), row["way"], *(c for p in both for c in p), *judged, f"{row['seconds']:.0f}"))
    return made


def _with(row: Mapping[str, Any], name: str, digits: int = 4) -> str:
    if row[name] is None:
        return ""
    spread = row[f"{name}_sd"]
    return f"{row[name]:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
