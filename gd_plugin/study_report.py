"""The report of a study: tables as Markdown and CSV, pictures, and one page that holds them all."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from .markdown import code, one_line, plain, visible
from .markdown import table as markdown_table
from .record import write_atomic
from .stats import COLUMNS, Method, StudyResults, Summary, read_study
from .study_plots import plot_accuracy_ece, plot_loss, plot_study_reliability, plot_warmup
from .terminal import Console

__all__ = ["csv_table", "difference", "markdown_tables", "mean_and_sd", "report"]

# Tables of the report: title, and the columns by their keys.
_RESULTS = ("accuracy", "nll", "brier", "ece", "adaptive_ece", "mce", "confidence_gap")
_COMPARED = ("accuracy", "nll", "ece", "confidence_gap", "early_accuracy", "train_cross_entropy")
_PAIRED = ("accuracy", "nll", "ece", "confidence_gap", "early_accuracy", "train_cross_entropy")
_CALIBRATED = ("nll", "temperature/nll", "vector/nll", "ece", "temperature/ece", "vector/ece")
_SPEED = ("epochs_to_loss", "epochs_to_accuracy")
_PICTURES: dict[str, tuple[str, Callable]] = {
    "loss": ("Training loss", plot_loss),
    "accuracy_ece": ("Accuracy against calibration error", plot_accuracy_ece),
    "reliability": ("Reliability, seeds pooled", plot_study_reliability),
    "warmup": ("Start and length of the warm-up", plot_warmup),
}


def report(folder: Path, console: Console, suffix: str = "png") -> StudyResults:
    """Write ``table.md``, ``table.csv``, the pictures and ``index.html`` into a study's folder, and print the table.

    Args:
        suffix: of the pictures, ``"png"`` or ``"svg"``.

    Raises:
        ValueError: as `gd_plugin.stats.read_study`.
        OSError: the folder cannot be written to.
    """
    study = read_study(folder)
    write_atomic(folder / "table.md", markdown_tables(study))
    write_atomic(folder / "table.csv", csv_table(study))
    pictures = {}
    for name, (title, plot) in _PICTURES.items():
        path = folder / f"{name}.{suffix}"
        try:
            plot(study, path)
        except ValueError as error:  # nothing of that kind in this study
            console.print(str(error), soft_wrap=True, markup=False)
        else:
            pictures[title] = path
    write_atomic(folder / "index.html", _page(study, pictures))
    _print(study, console)
    console.print(f"Tables, pictures and a page with all of it: {folder}/index.html", soft_wrap=True, markup=False)
    return study


def markdown_tables(study: StudyResults) -> str:
    """All tables with their captions, as GitHub shows them. The same records give the same bytes."""
    title = f"# {plain(study.dataset)}, split: {plain(study.tested_on)}"
    parts = [title, *_notes(study, plain, code, "**{}**".format)]
    for title, head, rows in _tables(study):
        parts.append(f"## {plain(title)}\n\n{markdown_table(head, rows)}")
    return "\n\n".join(parts) + "\n"


def csv_table(study: StudyResults) -> str:
    """One line per method and metric, with the raw value of every seed; fractions, not percent."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = ("n", "mean", "sd", "difference", "low", "high", "p", "q")
    table.writerow(["method", "versus", "metric", *names, *(f"seed {seed}" for seed in study.seeds)])
    groups = [(m.name, study.baseline.name, m.summaries) for m in study.methods]
    groups += [(pair.warmup.name, pair.fixed.name, pair.summaries) for pair in study.pairs]
    for name, versus, summaries in groups:
        for key, summary in summaries.items():
            numbers = [getattr(summary, name) for name in names] + [summary.values.get(seed) for seed in study.seeds]
            table.writerow([name, versus, key, *(_exact(number) for number in numbers)])
    return text.getvalue()


def mean_and_sd(key: str, summary: Summary) -> str:
    """``98.61 ± 0.20``, the mean alone of one run, ``-`` of none."""
    column = COLUMNS[key]
    if not summary.n:
        return "-"
    text = _number(summary.mean * column.scale, column.digits, column.signed)
    return text if math.isnan(summary.sd) else f"{text} ± {summary.sd * column.scale:.{column.digits}f}"


def _tables(study: StudyResults) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of every table, in plain text."""
    results = [
        [m.name, str(len(m.records)), *(mean_and_sd(key, m.summaries[key]) for key in _RESULTS)] for m in study.methods
    ]
    compared = [[m.name, *(difference(key, m.summaries[key]) for key in _COMPARED)] for m in study.methods[1:]]
    paired = [
        [f"{p.warmup.name} / {p.fixed.name}", *(difference(key, p.summaries[key]) for key in _PAIRED)]
        for p in study.pairs
    ]
    calibrated = [[m.name, *(mean_and_sd(key, m.summaries[key]) for key in _CALIBRATED)] for m in study.methods]
    speed = [[m.name, *(_reached(key, m, study.baseline) for key in _SPEED)] for m in study.methods]
    base = study.baseline.name
    tables = [
        ("Results", ["method", "n", *_titles(_RESULTS)], results),
        (f"Difference to {base}", ["method", *_titles(_COMPARED)], compared),
        ("Difference of a warm-up to its final beta alone", ["methods", *_titles(_PAIRED)], paired),
        ("After calibration on the validation split", ["method", *_titles(_CALIBRATED)], calibrated),
        ("Epochs", ["method", *(COLUMNS[key].title.replace("the baseline", base) for key in _SPEED)], speed),
    ]
    return [table for table in tables if table[2]]


def _titles(keys: tuple[str, ...]) -> list[str]:
    return [COLUMNS[key].title for key in keys]


def _notes(
    study: StudyResults,
    text: Callable[[object], str] = one_line,
    code: Callable[[object], str] = one_line,
    strong: Callable[[str], str] = str,
) -> list[str]:
    """What is to be known about the tables. ``text`` and ``code`` show other people's text, ``strong`` a whole note."""
    record = next(iter(study.baseline.records.values()))
    epochs = f"{record['epochs'][-1]['epoch']:g}" if record["epochs"] else "0"
    model, versions, hardware = record.get("model", {}), record.get("versions", {}), record.get("hardware", {})
    described = (
        f"{code(model.get('name'))}, {model.get('parameters', 0):,} weights, {record['dataset']['train']:,} training "
        f"samples, {epochs} epochs, evaluated after the last one on {record['dataset']['test']:,} samples. "
        f"{', '.join(f'{name} {text(versions.get(name))}' for name in ('torch', 'transformers', 'timm'))}; "
        f"{text(', '.join(hardware.get('gpu') or []) or hardware.get('cpu'))}."
    )
    if study.command:
        described += f" {code(study.command)}"
    notes = [
        described,
        "Mean ± standard deviation over the seeds. gap: confidence minus accuracy, positive is overconfident. ECE: 15 "
        "bins of equal width; adaptive: of equal mass. Temperature and vector scaling are fitted to the validation "
        "split, unless every sample of it is right, which leaves nothing to fit.",
    ]
    if len(study.seeds) > 1 and len(study.methods) > 1:
        notes.append(
            f"Differences to {text(study.baseline.name)} are paired by seed: mean (95% interval, Student's t, not "
            "corrected) and q, the p-value of the paired t-test corrected for the number of comparisons in its column "
            "(Benjamini-Hochberg); where all seeds differ by the same there is none. Few seeds find only large "
            "differences."
        )
    elif len(study.seeds) == 1:
        notes.append("One seed: no deviations, intervals or p-values can be given, and differences may be chance.")
    made = {
        (str(record.get("commit")), json.dumps([record.get("versions"), record.get("hardware")], sort_keys=True))
        for method in study.methods
        for record in method.records.values()
    }
    if len(made) > 1:
        notes.append(strong("The runs are not all of one commit, one set of versions and one kind of hardware."))
    if study.missing:
        runs = "1 run is" if study.missing == 1 else f"{study.missing} runs are"
        notes.append(strong(f"{runs} missing: the study was stopped, or some of its runs failed."))
    diverged = [f"{m.name} ({len(m.records) - m.summaries['nll'].n})" for m in study.methods if _diverged(m)]
    if diverged:
        notes.append(strong(f"Diverged, and left out of the means: {text(', '.join(diverged))}."))
    return notes


def _diverged(method: Method) -> bool:
    return method.summaries["nll"].n < len(method.records)


def difference(key: str, summary: Summary) -> str:
    """``+0.19 (-0.61 to +0.98), q 0.750``, less where there is no interval or no q, ``-`` where there is nothing."""
    column = COLUMNS[key]
    if math.isnan(summary.difference):
        return "-"
    mean, low, high = (
        _number(v * column.scale, column.digits, True) for v in (summary.difference, summary.low, summary.high)
    )
    interval = "" if math.isnan(summary.low) else f" ({low} to {high})"
    return mean + interval + ("" if math.isnan(summary.q) else f", q {_p(summary.q)}")


def _reached(key: str, method: Method, baseline: Method) -> str:
    """A run that never got there has no number of epochs: how many did is then said."""
    summary = method.summaries[key]
    runs = len(method.records.keys() & baseline.summaries[key].values.keys())  # that had something to reach
    if not summary.n:
        return "never" if runs else "-"
    return mean_and_sd(key, summary) + ("" if summary.n == runs else f" ({summary.n} of {runs})")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float, digits: int, signed: bool) -> str:
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.replace("-", "+" if signed else "") if float(text) == 0 else text  # no minus before a zero


def _exact(number: float | int | None) -> str:
    return "" if number is None or (isinstance(number, float) and math.isnan(number)) else repr(number)


def _print(study: StudyResults, console: Console) -> None:
    # Not `rich.markup.escape`, which doubles a backslash at the end.
    table = Table(title=Text(one_line(f"{study.dataset}, split: {study.tested_on}")))
    keys = ("accuracy", "nll", "ece", *(("confidence_gap",) if console.width >= 100 else ()))  # what the width holds
    for i, title in enumerate(("method", "n", *_titles(keys))):
        table.add_column(title, justify="right" if i else "left", overflow="fold", no_wrap=bool(i))
    for method in study.methods:
        cells = [mean_and_sd(key, method.summaries[key]) for key in keys]
        table.add_row(Text(method.name), str(len(method.records)), *cells)
    console.print(table)
    for note in _notes(study)[1:]:
        console.print(note, soft_wrap=True, markup=False)


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _page(study: StudyResults, pictures: dict[str, Path]) -> str:
    """One file without anything outside it: it can be mailed, and opened without a network."""
    title = _escaped(f"{study.dataset}: beta of the gradient-decay loss")
    body = [f"<h1>{title}</h1>"]
    body += [f"<p>{_escaped(note)}</p>" for note in _notes(study)]
    for name, head, rows in _tables(study):
        cells = "".join(f"<th>{_escaped(cell)}</th>" for cell in head)
        lines = "".join("<tr>" + "".join(f"<td>{_escaped(c)}</td>" for c in row) + "</tr>" for row in rows)
        body.append(f"<h2>{_escaped(name)}</h2><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>")
    for name, path in pictures.items():
        kind = "svg+xml" if path.suffix == ".svg" else "png"
        data = base64.b64encode(path.read_bytes()).decode()
        body.append(f'<h2>{_escaped(name)}</h2><img alt="{_escaped(name)}" src="data:image/{kind};base64,{data}">')
    return _HTML.format(title=title, body="\n".join(body))


_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .5rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
