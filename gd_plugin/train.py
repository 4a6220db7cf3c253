"""The main job, `gd-plugin train`: fine-tune a classifier, with one beta or several side by side, and show it."""

from __future__ import annotations

import argparse
import datetime
import math
import shlex
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .arguments import Run, parse
from .data import ClassificationData, PreparedImages, PreparedTexts, load_data
from .hf import GradientDecayTrainer, GradientDecayTrainingArguments
from .models import build_model
from .plots import plot_curves, plot_reliability
from .record import RECORD_FORMAT, environment, epochs_from_log, read_record, write_atomic, write_json

__all__ = ["Interrupted", "Job", "prepare"]

SETTINGS_FILE = "args.yaml"  # in the output folder: what the run was asked for, itself a recipe


class Interrupted(Exception):
    """Ctrl-C: training stopped after an update, with a checkpoint. The message says how to go on."""


def prepare(argv: list[str], recipes: Path) -> Job:
    """Read flags and recipe, load data and model, and check everything that can be checked before training.

    Args:
        argv: the words after ``gd-plugin train``.
        recipes: folder of the recipes that are found by name.

    Raises:
        ValueError: bad input, in one line that names the flag and what to do.
    """
    runs, options = parse(argv, recipes)
    for run in runs:
        _check_folder(run, options)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # one bar of our own over all runs
    console = Console(quiet=runs[0].args.process_index != 0)

    data = load_data(runs[0].data)
    model, processor = build_model(runs[0].model, data)
    for run in runs:
        _check_schedule(run.args, len(data.train))
        run.args.gd_config.check_num_classes(len(data.label_names))
    console.print(
        f"{data.name}: {len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test samples, "
        f"{len(data.label_names)} classes\n{runs[0].model.model}: {_parameters(model):,} parameters",
        soft_wrap=True,
        markup=False,
    )
    with console.status("Preparing the data"):
        prepared = PreparedImages if data.kind == "image" else PreparedTexts
        splits = [prepared(split, processor) for split in (data.train, data.validation, data.test)]
    command = f"gd-plugin train {shlex.join(_without_tokens(argv))}"
    return Job(runs, data, splits, Path(options.output_dir), command, console)


@dataclass
class Job:
    """Checked input of `gd-plugin train`; nothing is trained or written before `run`."""

    runs: list[Run]
    data: ClassificationData
    splits: list[torch.utils.data.Dataset]
    output_dir: Path
    command: str
    console: Console

    def run(self) -> list[dict]:
        """Train what is not complete yet, write records and pictures, print the table; returns the records.

        Raises:
            Interrupted: Ctrl-C.
        """
        with _progress(self.console, len(self.runs)) as bars, _stop_on_interrupt() as stop:
            records = [self._run_one(run, bars, stop) for run in self.runs]
        if self.runs[0].args.process_index == 0:
            plot_curves(records, self.output_dir / "curves.png")
            plot_reliability(records, self.output_dir / "reliability.png")
            _print_table(self.console, records)
            self.console.print(
                f"Models, records and pictures (curves.png, reliability.png): {self.output_dir}/",
                soft_wrap=True,
                markup=False,
            )
        return records

    def _run_one(self, run: Run, bars: _Bars, stop: _Stop) -> dict:
        """Train and evaluate one run, or read its record where it is already complete; returns the record."""
        args, record_path = run.args, run.folder / "record.json"
        if record_path.exists():  # only with --resume: `_check_folder` has seen to it
            bars.skip(run.name)
            return read_record(record_path)
        run.folder.mkdir(parents=True, exist_ok=True)
        if args.process_index == 0:
            write_atomic(run.folder / SETTINGS_FILE, yaml.safe_dump(run.settings, sort_keys=False))

        started = time.time()
        set_seed(args.seed)
        model, processor = build_model(run.model, self.data)
        trainer = GradientDecayTrainer(
            model=model,
            args=args,
            train_dataset=self.splits[0],
            eval_dataset=self.splits[1],
            processing_class=processor,
            callbacks=[stop, bars.callback(run.name)],
        )
        trainer.remove_callback(PrinterCallback)  # its lines would tear the progress bar
        trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(
                f"stopped after update {trainer.state.global_step} of {trainer.state.max_steps}, a checkpoint is in "
                f"{args.output_dir}; go on with --resume"
            )
        trainer.save_model()
        final = {
            key.removeprefix("test_"): value
            for key, value in trainer.evaluate(self.splits[2], metric_key_prefix="test").items()
            if not key.endswith(("_runtime", "_per_second", "epoch", "_time"))
        }
        log = trainer.state.log_history
        record = {
            "format": RECORD_FORMAT,
            "name": run.name,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": self.command,
            "config": run.settings,
            "gd": args.gd_config.to_dict(),
            "seed": args.seed,
            **environment(),
            "wall_time_s": round(time.time() - started, 1),
            "dataset": self.data.describe(),
            "model": {"name": run.model.model, "parameters": _parameters(model)},
            "epochs": epochs_from_log(log),
            "log": [entry for entry in log if "loss" in entry],
            "final": final,
            "reliability": trainer.reliability,
        }
        if trainer.is_world_process_zero():
            plot_curves([record], run.folder / "curves.png")
            plot_reliability([record], run.folder / "reliability.png")
            write_json(record_path, record)  # last: a record says that the run is complete
        return record


def _check_folder(run: Run, options: argparse.Namespace) -> None:
    """Refuse to mix two runs in one folder; with --overwrite remove the old one, and nothing that is not a run's."""
    folder = run.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; give a folder")
    checkpoints = list(folder.glob("checkpoint-*"))
    settings_path = folder / SETTINGS_FILE
    if not (checkpoints or settings_path.exists() or (folder / "record.json").exists()):
        return
    if options.overwrite:
        if run.args.process_index == 0:
            for checkpoint in checkpoints:
                shutil.rmtree(checkpoint)
            for name in ("record.json", SETTINGS_FILE, "curves.png", "reliability.png"):
                (folder / name).unlink(missing_ok=True)
        return
    if not options.resume:
        raise ValueError(
            f"{folder} already holds a run; go on with it with --resume, replace it with --overwrite, or choose "
            "another --output_dir"
        )
    before = yaml.safe_load(settings_path.read_text(encoding="utf-8")) if settings_path.exists() else None
    for key in sorted({*(before or {}), *run.settings}) if before is not None else ():
        if before.get(key) != run.settings.get(key):
            raise ValueError(
                f"{folder} holds a run with {key} {before.get(key)}, not {run.settings.get(key)}; resume it with the "
                "same settings, use --overwrite, or choose another --output_dir"
            )


def _check_schedule(args: GradientDecayTrainingArguments, samples: int) -> None:
    """A warm-up that is longer than training, before the first of several runs starts."""
    batches = math.ceil(samples / (args.per_device_train_batch_size * args.world_size))
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    try:
        args.gd_config.resolve(total, per_epoch)
    except ValueError as error:
        raise ValueError(f"gd_{error}") from None


def _without_tokens(argv: list[str]) -> list[str]:
    """A record travels: the value of any flag for a token stays at home."""
    words, hide = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        if hide:
            word = "***"
        elif flag.startswith("--") and flag.endswith("token") and equals:
            word = f"{flag}=***"
        hide = word.startswith("--") and word.endswith("token")
        words.append(word)
    return words


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class _Stop(TrainerCallback):
    """Ends training with a checkpoint after the update that is under way, when asked to."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested:
            control.should_save = control.should_training_stop = True


@contextmanager
def _stop_on_interrupt():
    """The first Ctrl-C asks `_Stop`, since within an update there is nothing whole to save; a second one kills."""
    stop = _Stop()
    previous = signal.getsignal(signal.SIGINT)

    def request(signum, frame):
        stop.requested = True
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


class _Bars(TrainerCallback):
    """One progress bar over all runs, in updates."""

    def __init__(self, progress: Progress, runs: int) -> None:
        self.progress, self.runs, self.done, self.name = progress, runs, 0, ""
        self.task = progress.add_task("", total=None)

    def callback(self, name: str) -> _Bars:
        self.name = name
        return self

    def skip(self, name: str) -> None:
        self.progress.print(f"{name}: already complete", markup=False)
        self.runs -= 1

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
def _progress(console: Console, runs: int):
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bars(progress, runs)


def _print_table(console: Console, records: list[dict]) -> None:
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
