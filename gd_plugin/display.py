"""What `gd-plugin train` shows on the terminal while it works: one progress bar over all runs."""

from __future__ import annotations

from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from .terminal import Console

__all__ = ["Bars", "progress"]


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
