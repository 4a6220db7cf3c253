"""What `gd-plugin train` shows on the terminal: one progress bar over all runs, and a table."""

from __future__ import annotations

import math
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

__all__ = ["Bars", "print_table", "progress"]


class Bars(TrainerCallback):
    """One progress bar over all runs, in updates."""

    def __init__(self, progress: Progress, runs: int) -> None:
        self.progress, self.runs, self.done, self.name = progress, runs, 0, ""
        self.task = progress.add_task("", total=None)

    def callback(self, name: str) -> Bars:
        self.name = name
        return self

    def skip(self, name: str) -> None:
        self.progress.print(f"{name}: already complete", markup=False)
        self.runs -= 1

    def finished(self, record: dict) -> None:
        """A line per run, also where the output is a file and no bar is drawn."""
        self.progress.print(f"{record['name']}: finished after {record['wall_time_s']:.0f} s", markup=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(
            self.task,
            total=self.runs * state.max_steps,
            completed=self.done + state.global_step,
            description=f"{self.name}, epoch {state.epoch:.1f} of {args.num_train_epochs:g}",
        )

    def on_train_end(self, args, state, control, **kwargs):
        self.done += state.max_steps


@contextmanager
def progress(console: Console, runs: int):
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress, runs)


def print_table(console: Console, records: list[dict]) -> None:
    table = Table(title=escape(f"{records[0]['dataset']['name']}, split: {records[0]['dataset']['tested_on']}"))
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
    table.add_column("seconds", justify="right")
    for record in records:
        values = [record["final"][key] for _, key, _, _ in columns]
        cells = [
            "diverged" if value is None or math.isnan(value) else text.format(value * scale)
            for value, (_, _, scale, text) in zip(values, columns, strict=True)
        ]
        table.add_row(escape(record["name"]), *cells, f"{record['wall_time_s']:.0f}")
    console.print(table)
    console.print("gap: confidence minus accuracy, positive is overconfident. One seed: differences may be chance.")
