"""Predictions for files of any length: rows come and go in chunks, and what was said of them waits on disk."""

import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ... import data
from ...data import Row
from ...errors import ConfigError, listed
from ...metrics import Record
from .._build import Network
from .._predict import batches, moved, predict
from .._progress import Progress, Silent
from .._run import Run
from ._given import Given, Reading, routed_by, routes

CHUNK = 1024  # rows in memory: batches are of like lengths within them
DIGITS = 6


def tell(network: Network, rows: Iterable[Row], unknown: str = "error") -> Iterator[tuple[Row, dict[str, Any]]]:
    """Each row with what is said of it, {column: value}: rows of all tasks and labels together, CHUNK at a time."""
    stream = iter(rows)
    while chunk := list(islice(stream, CHUNK)):
        found = [routes(network, row, unknown) for row in chunk]
        if network.encoder.kind == "seq2seq":
            yield from zip(chunk, ({"prediction": said} for said in generated(network, chunk, found)), strict=True)
            continue
        for row, record in zip(chunk, predict(network, chunk, routes=found), strict=True):
            yield row, said_of(record, network.encoder.kind, row.task in network.encoder.measured)


def said_of(record: Record, kind: str, measured: bool) -> dict[str, Any]:
    """The columns of a row: a class or tags, and how sure; a number; how unlikely a text is."""
    if kind in ("causal", "masked"):
        nll = None if not record.tokens else round(float(record.nll or 0.0), DIGITS)
        perplexity = None if nll is None else round(math.exp(min(nll / record.tokens, 700.0)), DIGITS)
        return {"nll": nll, "tokens": record.tokens, "perplexity": perplexity}
    if measured:
        return {"prediction": float(f"{record.prediction:.7g}"), "confidence": None}
    sure = None if record.confidence is None else round(record.confidence, DIGITS)
    return {"prediction": record.prediction, "confidence": sure}


def told_columns(reading: Reading, task: str | None) -> list[str]:
    """The names of the columns that are added to files of a task, or of any of the run's tasks."""
    kinds = {reading.kinds[task]} if task is not None else set(reading.kinds.values())
    if kinds & {"causal", "masked"}:
        return ["nll", "tokens", "perplexity"]
    return ["prediction"] if kinds <= {"regression", "seq2seq"} else ["prediction", "confidence"]


@torch.no_grad()
def generated(
    network: Network, rows: Sequence[Row], found: Sequence[dict[str, str | None]], size: int = 32
) -> list[str]:
    """The likeliest text that answers each row, piece by piece."""
    encoder, out = network.encoder, [""] * len(rows)
    model: Any = network.model
    examples = encoder.encode([replace(row, target="") for row in rows], found)
    for places in batches(examples, size):
        batch = moved(encoder.collate([examples[i] for i in places]), network.device)
        for key in ("labels", "decoder_input_ids"):
            del batch[key]
        ids = model.generate(**batch, max_new_tokens=encoder.max_length, do_sample=False, num_beams=1)
        for i, said in zip(places, encoder.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            out[i] = said
    return out


class Spool:
    """One column on disk, written and then read once, in order: what `data.write_rows` takes in place of a list."""

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder)  # noqa: SIM115 (`close` is below)
        self.count, self.at = 0, 0

    def add(self, value: Any) -> None:
        self.file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self.count += 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, places: slice) -> list[Any]:
        if self.at == 0:
            self.file.seek(0)
        if places.start != self.at:
            raise IndexError(f"a spool is read in order: {places.start} after {self.at}")
        self.at = places.stop
        return [json.loads(line) for line in islice(self.file, places.stop - places.start)]

    def close(self) -> None:
        self.file.close()


def checked(network: Network, reading: Reading, given: Given, unknown: str) -> int:
    """How many rows there are, all of them sound and with a way to go; raises DataError or ConfigError if not."""
    count, labels = 0, routed_by(network)
    first: ConfigError | None = None
    bad: dict[str, int] = {}
    for row in reading.stream(given, labels, patient=True):
        count += 1
        try:
            routes(network, row, unknown)
        except ConfigError as error:
            first = first or error
            key = ", ".join(f"{label}={row.labels.get(label)!r}" for label in labels)
            bad[key] = bad.get(key, 0) + 1
    if first is not None:
        rows = sum(bad.values())
        more = f" There are {rows:,} such rows: {listed(bad)}." if rows > 1 else ""
        raise ConfigError(f"{first}{more}")
    return count


def opened(
    run: Run, reading: Reading, jobs: Sequence[Given], unknown: str, progress: Progress
) -> tuple[Network, list[int]]:
    """(the run's network, how many rows each job has), when every row has been read and found sound."""
    if unknown not in ("error", "base"):
        raise ConfigError(f"unknown={unknown!r}: rows of new label values are an 'error', or go through the 'base'.")
    with progress.stage("Open the run"):
        network = run.network()
    reading.fits(routed_by(network))
    with progress.stage("Check the rows"):
        return network, [checked(network, reading, one, unknown) for one in jobs]


def tell_rows(
    run: Run,
    files: Sequence[str],
    *,
    reading: Reading | None = None,
    task: str | None = None,
    unknown: str = "error",
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Each row as a mapping: where it is, its text, task and labels, and what the run says of it; as `tell_files`."""
    progress, reading = progress or Silent(), reading or Reading(run)
    jobs = reading.given(files, task)
    network, counts = opened(run, reading, jobs, unknown, progress)
    labels, done = routed_by(network), 0
    with progress.stage("Predict", sum(counts)) as bar:
        for one in jobs:
            for row, said in tell(network, reading.stream(one, labels), unknown):
                done += 1
                bar.step(done)
                pair = {} if row.pair is None else {"pair": row.pair}
                names = told_columns(reading, one.task)
                yield {"where": row.where, "text": row.text, **pair, **row.labels, **{n: said[n] for n in names}}


def tell_files(
    run: Run,
    files: Sequence[str],
    out: str | Path,
    *,
    reading: Reading | None = None,
    task: str | None = None,
    unknown: str = "error",
    force: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write files again, in their own formats, with what the run says of each row; returns the files made.

    **Arguments:** files: FILE or TASK=FILE. out: a file of the same format for one file; otherwise a folder, where each
    keeps its name. reading: columns, where they differ from the run's. unknown: "base" lets rows of label values that
    the run does not know through without modules. force: files that are there are replaced.
    Every row is read before the first prediction. Raises DataError or ConfigError, and then nothing was written.
    """
    progress, out, reading = progress or Silent(), Path(out), reading or Reading(run)
    jobs = reading.given(files, task)
    places = [data.written(out, one.source, told_columns(reading, one.task)) for one in jobs]
    _free(_flat(places), jobs, out, force)
    network, counts = opened(run, reading, jobs, unknown, progress)
    mixed = len(set(reading.kinds.values())) > 1
    with _aside(out) as aside, ExitStack() as stack:
        columns, done = [], 0
        with progress.stage("Predict", sum(counts)) as bar:
            for one, some in zip(jobs, places, strict=True):
                # Classes and numbers together: a column of a Parquet file has one type.
                texts = mixed and one.task is None and any(place.suffix.lower() == ".parquet" for place in some)
                spools = {name: stack.enter_context(closing(Spool(aside))) for name in told_columns(reading, one.task)}
                for _, said in tell(network, reading.stream(one, routed_by(network)), unknown):
                    for name, spool in spools.items():
                        spool.add(str(said[name]) if texts and name == "prediction" else said[name])
                    done += 1
                    bar.step(done)
                columns.append(spools)
        with progress.stage("Write"):
            for one, some, more in zip(jobs, places, columns, strict=True):
                data.write_rows(aside / out.name if some == [out] else aside, one.source, more)
            for place in _flat(places):
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(aside / place.name, place)
    return _flat(places)


def _flat(places: Iterable[Sequence[Path]]) -> list[Path]:
    return [place for some in places for place in some]


def _free(places: Sequence[Path], jobs: Sequence[Given], out: Path, force: bool) -> None:
    """Raise ConfigError for a file that would be lost."""
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ConfigError(f"out={str(out)!r}: several files would be {twice}. Give a folder, and files of other names.")
    sources = {file.resolve() for one in jobs for name in one.files for file in _under(Path(name))}
    for place in places:
        if place.resolve() in sources:
            raise ConfigError(f"out={str(out)!r}: {place} is what is read. Choose another name.")
        if place.exists() and not force:
            raise ConfigError(f"{place} exists, and is not overwritten. Choose another name, or say --force.")


def _under(path: Path) -> Iterable[Path]:
    return path.rglob("*") if path.is_dir() else [path]


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside what is to be made, gone at the end, as is every folder above it that was made in vain."""
    made = [one for one in out.parents if not one.exists()]
    aside = out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        aside.mkdir(parents=True)
        yield aside
    except OSError as error:
        raise ConfigError(f"{out}: it can't be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for one in made:
            with suppress(OSError):  # not empty: something was made
                one.rmdir()
