"""``gd-plugin report``: pictures and a table of finished or running runs, from their records alone."""

from __future__ import annotations

import math
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from .parser import Parser
from .plots import plot_curves, plot_reliability
from .record import STUDY_FILE, read_record
from .terminal import Console

__all__ = ["draw", "main", "print_table"]

_NEEDED = ("dataset.name", "dataset.tested_on")  # of a record


def main(argv: list[str]) -> int:
    """Run ``gd-plugin report`` with the words after the command, and return its exit code.

    Raises:
        ValueError: a folder without a record, or one that cannot be read; one line.
        OSError: the output folder cannot be written to.
    """
    parser = Parser(
        prog="gd-plugin report",
        description="Draws training curves and a reliability diagram of every run into its folder, and where there are "
        "several, of all of them in one picture into --output_dir; prints their last metrics.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=Path,
        help="folder of a run of gd-plugin train or gd-plugin timm, a folder of such folders, or of gd-plugin study",
    )
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        type=Path,
        help="where the pictures of several runs go; default: the folder that holds them all",
    )
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the pictures; default: %(default)s")
    options = parser.parse_args(argv)

    console = Console(emoji=False)  # a name is other people's text
    studies = [folder for folder in options.runs if (folder / STUDY_FILE).is_file()]
    if studies:
        if len(studies) < len(options.runs):
            raise ValueError("studies and single runs cannot be compared; give one kind at a time")
        if options.output_dir:
            raise ValueError("--output_dir is for single runs; the report of a study goes into its own folder")
        for folder in studies:
            _report_study(folder, console, options.format)
        return 0

    once: dict[Path, Path] = {}  # however often a run is named
    for folder in (folder for run in options.runs for folder in _folders(run)):
        once.setdefault(folder.resolve(), folder)
    folders = list(once.values())
    records = [read_record(folder / "record.json", _NEEDED) for folder in folders]
    output_dir = options.output_dir
    if len(records) > 1 and not output_dir:
        parents = {folder.resolve().parent for folder in folders}
        if len(parents) > 1:
            raise ValueError("these runs lie in different folders: say with --output_dir where their pictures go")
        output_dir = parents.pop()
    if output_dir and output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; give a folder")
    for folder, record in zip(folders, records, strict=True):
        draw([record], folder, console, options.format)
    if output_dir:
        output_dir.mkdir(parents=True, exist_ok=True)
        draw(records, output_dir, console, options.format)
    print_table(console, records)
    for folder in folders:
        settings, record = folder / "args.yaml", folder / "record.json"
        if settings.is_file() and settings.stat().st_mtime > record.stat().st_mtime:
            console.print(
                f"{folder}: args.yaml is newer than record.json, so this is the record of an earlier run in the same "
                "folder, or a run has just begun",
                soft_wrap=True,
                markup=False,
            )
    console.print(f"Pictures (curves, reliability): {output_dir or folders[0]}/", soft_wrap=True, markup=False)
    return 0


def _report_study(folder: Path, console: Console, suffix: str) -> None:
    try:
        from .study_report import report
    except ModuleNotFoundError as error:
        raise ValueError(f"the report of a study needs {error.name}: pip install 'gd_plugin[study]'") from None
    report(folder, console, suffix)


def _folders(run: Path) -> list[Path]:
    """The folder itself where it holds a record, or those in it that do."""
    if run.name == "record.json":
        run = run.parent
    if (run / "record.json").is_file():
        return [run]
    if not run.exists():
        raise ValueError(f"{run} does not exist; give the output folder of gd-plugin train, study or timm")
    folders = sorted(path.parent for path in run.glob("*/record.json"))
    if not folders:
        raise ValueError(
            f"{run} holds no record.json, nor does a folder in it; give the output folder of gd-plugin train or "
            "gd-plugin timm (a run of train.py alone has no record; --loss gd --gd-beta 1 is its cross-entropy)"
        )
    return folders


def draw(records: list[dict], folder: Path, console: Console, suffix: str = "png") -> None:
    """Training curves and reliability diagrams of some records, into ``folder``."""
    for plot, name in ((plot_curves, "curves"), (plot_reliability, "reliability")):
        try:
            plot(records, folder / f"{name}.{suffix}")
        except ValueError as error:  # nothing was logged, or nothing was finite: no reason to lose the rest
            console.print(str(error), soft_wrap=True, markup=False)


def print_table(console: Console, records: list[dict]) -> None:
    """The last metrics of some records, a line each."""
    titles = dict.fromkeys(f"{r['dataset']['name']}, split: {r['dataset']['tested_on']}" for r in records)
    table = Table(title=escape("; ".join(titles)))
    table.add_column("run", overflow="fold")
    columns = (
        ("accuracy %", "accuracy", 100, "{:.2f}"),
        ("NLL", "nll", 1, "{:.4f}"),
        ("Brier", "brier", 1, "{:.4f}"),
        ("ECE %", "ece", 100, "{:.2f}"),
        ("gap %", "confidence_gap", 100, "{:+.2f}"),
    )
    for title, *_ in columns:
        table.add_column(title, justify="right")
    epochs = [_epochs(record) for record in records]
    if any("/" in text for text in epochs):  # a run was ended before
        table.add_column("epochs", justify="right")
    else:
        epochs = [""] * len(records)
    table.add_column("seconds", justify="right")
    for record, done in zip(records, epochs, strict=True):
        cells = [_cell(record["final"], key, scale, text) for _, key, scale, text in columns]
        table.add_row(escape(record["name"]), *cells, *filter(None, [done]), f"{record['wall_time_s']:.0f}")
    console.print(table)
    console.print("gap: confidence minus accuracy, positive is overconfident. One seed: differences may be chance.")


def _epochs(record: dict) -> str:
    """How many epochs, and of how many where the run was ended before."""
    done = record["epochs"][-1]["epoch"] if record["epochs"] else 0
    planned = record["config"].get("num_train_epochs", record["config"].get("epochs"))
    return f"{done:.3g}/{planned:.3g}" if isinstance(planned, (int, float)) and done < planned else f"{done:.3g}"


def _cell(final: dict, key: str, scale: float, text: str) -> str:
    if key not in final:  # trained without validation
        return "-"
    value = final[key]
    return "diverged" if value is None or math.isnan(value) else text.format(value * scale)
