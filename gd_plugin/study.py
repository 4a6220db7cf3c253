"""`gd-plugin study`: every method of a recipe with several seeds, in parallel, one record per run.

The layout of a study's folder, which `gd_plugin.report` reads::

    study.json                what was asked for: recipe, methods in their order, seeds, command
    seed-0/beta-5.json        the record of one run, as `gd-plugin train` writes it
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .arguments import Run, parse, parse_one
from .fit import fit
from .folder import check_writable
from .parser import Parser
from .record import (
    RECORD_FORMAT,
    STUDY_FILE,
    commit,
    differences,
    json_text,
    publishable,
    publishable_words,
    read_record,
    versions,
    write_json,
)
from .stats import read_plan
from .study_report import report
from .terminal import Console
from .train import check_runs, load

__all__ = ["Study", "prepare"]


# What differs between machines and not between results.
_NOT_COMPARED = (
    "data_dir",
    "label_column",
    "use_cpu",
    "dataloader_num_workers",
    "num_classes",
)  # the data are compared
_USAGE = """usage: gd-plugin study RECIPE [--seeds N] [--jobs N] [--executor process|ray] [--flag value ...]

Trains every method of the recipe's `study` with every seed and reports n, mean, deviation and paired differences to
the first method. A study that was stopped goes on when the same command is given again.

  --seeds N              seeds 0 to N - 1; default: 5
  --jobs N               runs at a time; default: one per GPU, or one per two CPU cores
  --executor process     processes of this machine, the default
  --executor ray         tasks of the Ray cluster that `ray start` or RAY_ADDRESS names, or of a local one
  --output_dir FOLDER    default: studies/RECIPE
  --overwrite            train again what is complete already

All other flags are those of gd-plugin train (--help there), and override the recipe.
"""


def prepare(argv: list[str], recipes: Path) -> Study:
    """Read flags and recipe, load the data once, and check everything that can be checked before training.

    Args:
        argv: the words after ``gd-plugin study``.
        recipes: folder of the recipes that are found by name.

    Raises:
        ValueError: bad input, in one line that names the flag and what to do.
    """
    if {"-h", "--help"} & set(argv):
        print(_USAGE)
        raise SystemExit(0)
    flags = Parser(prog="gd-plugin study", add_help=False, allow_abbrev=False)
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--jobs", type=int)
    flags.add_argument("--executor", choices=("process", "ray"), default="process")
    own, words = flags.parse_known_args(argv)
    for name, value in (("--seeds", own.seeds), ("--jobs", own.jobs)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if own.executor == "ray":
        _import_ray()
    if any(word.split("=")[0] in ("--seed", "--resume", "--runs") for word in words):
        raise ValueError("--seed, --resume and --runs are for gd-plugin train; a study has --seeds, goes on by itself")

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a study starts its own processes: run it without torchrun or accelerate launch, with --jobs")

    words += ["--save_strategy", "no"]  # a study keeps records, not models
    runs, options = parse(words, recipes, "study")
    if any(run.args.push_to_hub for run in runs):
        raise ValueError("--push_to_hub: a study keeps no models; train one with gd-plugin train and push that")
    check_runs(runs)
    folder = Path(options.output_dir)
    check_writable(folder)
    tasks = [Task(seed, run) for seed in range(own.seeds) for run in runs]
    console = Console(emoji=False)
    data, _ = load(runs, console)  # what is wrong with the data shows here, not in a worker
    done = {} if options.overwrite else _complete(folder, tasks, data.describe(), console)
    if not options.overwrite:
        _refuse_a_part(folder, [run.name for run in runs], own.seeds)
    gpus = torch.cuda.device_count()
    return Study(
        folder=folder,
        tasks=tasks,
        done=done,
        seeds=own.seeds,
        jobs=own.jobs or gpus or max(1, (os.cpu_count() or 1) // 2),
        gpus=gpus,
        executor=own.executor,
        command=f"gd-plugin study {shlex.join(publishable_words(argv))}",
        console=console,
    )


@dataclass
class Task:
    """One run of a study: a seed and a method."""

    seed: int
    run: Run

    def path(self, folder: Path) -> Path:
        return folder / f"seed-{self.seed}" / f"{self.run.folder.name}.json"

    @property
    def settings(self) -> dict[str, Any]:
        settings = {key: publishable(value) for key, value in self.run.settings.items() if key != "seed"}
        settings |= {"seed": self.seed} if self.seed != 42 else {}  # 42: the Trainer's default
        return json.loads(json_text(settings))  # as a record holds them: an infinity is null there


@dataclass
class Study:
    """A checked study; nothing is trained or written before `run`."""

    folder: Path
    tasks: list[Task]
    done: dict[Path, dict]
    seeds: int
    jobs: int
    gpus: int
    executor: str
    command: str
    console: Console

    def run(self) -> int:
        """Train what is not complete yet, then report; returns the exit code."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for task in self.tasks:
            if task.path(self.folder) not in self.done:  # with --overwrite, old records must not pass for new ones
                task.path(self.folder).unlink(missing_ok=True)
        write_json(
            self.folder / STUDY_FILE,
            {
                "format": RECORD_FORMAT,
                "dataset": self.tasks[0].run.data.dataset,
                "methods": [task.run.name for task in self.tasks if task.seed == 0],
                "seeds": list(range(self.seeds)),
                "command": self.command,
            },
        )
        waiting = [task for task in self.tasks if task.path(self.folder) not in self.done]
        if self.done:
            self.console.print(f"{len(self.done)} of {len(self.tasks)} runs are complete already", markup=False)
        try:
            failed = self._train(waiting) if waiting else []
        except KeyboardInterrupt:
            print("gd-plugin: stopped; the same command, without --overwrite, goes on where it was", file=sys.stderr)
            return 130
        for task, reason in failed:
            self.console.print(f"failed: seed {task.seed}, {task.run.name}: {reason}", soft_wrap=True, markup=False)
        try:
            report(self.folder, self.console)
        except ValueError as error:  # nothing to compare with
            print(f"gd-plugin: error: {error}", file=sys.stderr)
            return 1
        return 1 if failed else 0

    def _train(self, waiting: list[Task]) -> list[tuple[Task, str]]:
        start = _in_processes if self.executor == "process" else _on_ray
        failed = []
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        # A run takes minutes: its speed is that of the whole study, not of the last half minute.
        with Progress(*columns, console=self.console, speed_estimate_period=1e9) as progress:
            bar = progress.add_task("runs", total=len(waiting))
            for task, record, reason in start(self, waiting):
                if record is None:
                    failed.append((task, reason))
                else:
                    path = task.path(self.folder)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, record)
                    progress.print(_line(record), markup=False, soft_wrap=True)
                progress.advance(bar)
        return failed


def _line(record: dict) -> str:
    accuracy, nll, ece = (record["final"].get(key, math.nan) for key in ("accuracy", "nll", "ece"))
    return (
        f"seed {record['seed']}, {record['name']}: accuracy {100 * accuracy:.2f} %, NLL {nll:.4f}, ECE "
        f"{100 * ece:.2f} %, {record['wall_time_s']:.0f} s"
    )


def _refuse_a_part(folder: Path, methods: list[str], seeds: int) -> None:
    """A study of fewer methods or seeds would take the place of the larger one's tables and pictures."""
    try:
        before = read_plan(folder)
    except ValueError:  # none, or none that could be read: there is nothing to lose
        return
    lost = [name for name in before["methods"] if name not in methods]
    lost += [f"seed {seed}" for seed in before["seeds"] if seed >= seeds]
    if lost:
        raise ValueError(
            f"{folder} holds a study that is larger, by {', '.join(lost)}: gd-plugin report {folder} shows it; give "
            "another --output_dir, or as many --methods and --seeds, or --overwrite"
        )


def _complete(folder: Path, tasks: list[Task], dataset: dict, console: Console) -> dict[Path, dict]:
    """The records of the study that are there already, by their files; a damaged one is set aside."""
    done = {}
    for task in tasks:
        path = task.path(folder)
        if not path.exists():
            continue
        try:
            record = read_record(path)
        except ValueError as error:
            if "record of format" in str(error):
                raise
            aside = next(p for i in range(1000) if not (p := path.with_suffix(f".corrupt-{i}")).exists())
            path.rename(aside)
            console.print(f"{error}; set aside as {aside.name}", soft_wrap=True, markup=False)
            continue
        if record["dataset"] != dataset:
            raise ValueError(
                f"{path} is of other data: {differences(record['dataset'], dataset)}; choose another --output_dir, or "
                "train it again with --overwrite"
            )
        if record["name"] != task.run.name:  # names that make the same file name
            raise ValueError(
                f"{path} is of the method {record['name']!r}, not {task.run.name!r}; choose another --output_dir, or "
                "train it again with --overwrite"
            )
        before, now = record["config"], task.settings
        for key in sorted({*before, *now} - set(_NOT_COMPARED)):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{path} is of another study: {key} is {before.get(key, 'not set')} there and "
                    f"{now.get(key, 'not set')} here; choose another --output_dir, or train it again with --overwrite"
                )
        done[path] = record
    if len(done) < len(tasks):
        _check_code(done, console)
    return done


def _check_code(done: dict[Path, dict], console: Console) -> None:
    """Runs to come must be of the same versions as those that are there; of another commit, they are pointed out."""
    here = versions()
    for path, record in done.items():
        if record.get("versions", here) != here:
            raise ValueError(
                f"{path} is of other versions: {differences(record['versions'], here)}; install those, choose another "
                "--output_dir, or train it again with --overwrite"
            )
    head = commit()
    others = {record.get("commit") for record in done.values()} - {head}
    if others:
        of, now = (" and ".join(sorted(str(c or "unknown") for c in commits)) for commits in (others, {head}))
        console.print(
            f"Complete runs are of commit {of}, and those to come of commit {now}: the report will say so; --overwrite "
            "trains all of them again",
            soft_wrap=True,
            markup=False,
        )


class _Worker:
    """Holds the data, prepared once, and trains one run after the other."""

    def __init__(self, name: str, words: list[str], command: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.command = command
        self.data, self.splits = load([parse_one(name, words)], Console(quiet=True))

    def work(self, name: str, words: list[str], seed: int) -> dict:
        run = parse_one(name, [*words, f"--seed={seed}"])
        with tempfile.TemporaryDirectory() as folder:
            run.args.output_dir = folder
            return fit(run, self.data, self.splits, self.command, callbacks=[], save_model=False)


def _threads(study: Study) -> int:
    return max(1, min((os.cpu_count() or 1) // study.jobs, torch.get_num_threads()))  # which OMP_NUM_THREADS sets


_worker: _Worker | None = None  # of a worker process


def _start_worker(*args) -> None:
    global _worker
    # A pool's worker does not notice that the study was killed, and would train what nobody waits for.
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    _worker = _Worker(*args)


def _work(*args) -> dict:
    return _worker.work(*args)


def _in_processes(study: Study, waiting: list[Task]) -> Iterator[tuple[Task, dict | None, str]]:
    """One pool of one process per job: what kills a process fails one run, and each keeps its GPU."""
    context = get_context("spawn")  # not forked: torch's threads and CUDA do not survive that
    first = study.tasks[0].run
    arguments = (first.name, first.words, study.command, _threads(study))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(study.gpus)]
    pools = [ProcessPoolExecutor(1, context, _start_worker, arguments) for _ in range(min(study.jobs, len(waiting)))]
    tasks, running = iter(waiting), {}

    def start(pool: ProcessPoolExecutor, task: Task) -> None:
        if gpus:  # inherited by the process that the pool starts now, since importing torch looks for them
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[pools.index(pool) % len(gpus)]
        running[pool.submit(_work, task.run.name, task.run.words, task.seed)] = (task, pool)

    try:
        for pool in pools:
            start(pool, next(tasks))
        while running:
            finished = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            task, pool = running.pop(finished)
            try:
                result = (task, finished.result(), "")
            except BrokenProcessPool:
                result = (task, None, "its process was killed (out of memory?); give the command again")
                pools[pools.index(pool)] = pool = ProcessPoolExecutor(1, context, _start_worker, arguments)
            except Exception as error:  # of one run; the others go on
                result = (task, None, f"{type(error).__name__}: {error}")
            following = next(tasks, None)
            if following is not None:
                start(pool, following)
            yield result
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        if visible is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _import_ray():
    try:
        import ray
    except ImportError:
        raise ValueError("--executor ray needs Ray: pip install 'gd_plugin[ray]'") from None
    return ray


def _on_ray(study: Study, waiting: list[Task]) -> Iterator[tuple[Task, dict | None, str]]:
    """One actor per job, each with its cores or its GPU; Ray finds the machines, and replaces a dead actor.

    Data that are not on the Hub must lie in the same folder on every machine; recipes need not.
    """
    ray = _import_ray()
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    threads = _threads(study)
    resources = {"num_gpus": 1} if study.gpus else {"num_cpus": threads}
    actor = ray.remote(max_restarts=3, max_task_retries=3, **resources)(_Worker)
    first = study.tasks[0].run
    tasks, running = iter(waiting), {}

    def start(worker, task: Task) -> None:
        running[worker.work.remote(task.run.name, task.run.words, task.seed)] = (task, worker)

    for task in itertools.islice(tasks, study.jobs):
        start(actor.remote(first.name, first.words, study.command, threads), task)
    while running:
        (finished,), _ = ray.wait(list(running))
        task, worker = running.pop(finished)
        try:
            result = (task, ray.get(finished), "")
        except Exception as error:  # of one run; the others go on
            result = (task, None, f"{type(error).__name__}: {error}")
        following = next(tasks, None)
        if following is not None:
            start(worker, following)
        else:
            ray.kill(worker)  # its place may be what the next one waits for
        yield result
