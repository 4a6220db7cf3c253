"""The main job, `gd-plugin train`: fine-tune a classifier, with one beta or several side by side, and show it."""

from __future__ import annotations

import errno
import math
import os
import shlex
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
import yaml
from accelerate.utils import gather
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, default_data_collator, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import HubStrategy

from .arguments import Run, parse
from .baselines import baseline
from .card import is_ours, write_run_card
from .data import ClassificationData, PreparedImages, PreparedTexts, load_data
from .display import Bars, progress
from .fit import Interrupted, fit
from .folder import SETTINGS_FILE, check_folder, last_whole_checkpoint, remove_run
from .hf import GradientDecayTrainingArguments
from .hf_callback import refuse_data_parallel, with_gd_prefix
from .metrics import METRICS
from .models import build_model
from .push import PushError, check_token, hub_errors, push
from .record import publishable_words, read_record, write_atomic, write_json
from .report import draw, print_table
from .terminal import Console
from .trace import find_head

__all__ = ["FullDisk", "Interrupted", "Job", "PushError", "check_runs", "load", "prepare"]

_AGREE_EVERY = 10  # updates
_SAME_CTRL_C = 2.0  # seconds
_LITTLE_SPACE = 2**20  # bytes; less than any checkpoint takes
_AT_LEAST_1 = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# Flags that must be numbers from 0 to below this one; None is as good as no flag.
_NUMBERS = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon"), math.inf),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), 1),
    **dict.fromkeys(("seed", "data_seed"), 2**32),  # numpy's
    **dict.fromkeys((*_AT_LEAST_1, "dataloader_num_workers", "logging_steps", "save_steps", "eval_steps"), 2**31),
}
_NEED_A_MODEL = ("lomo", "galore", "apollo")  # optimizers that are made for its layers


class FullDisk(Exception):
    """What was written whole before is still there. The message is one line."""


def prepare(argv: list[str], recipes: Path) -> Job:
    """Read flags and recipe, load data and model, and check everything that can be checked before training.

    Args:
        argv: the words after ``gd-plugin train``.
        recipes: folder of the recipes that are found by name.

    Raises:
        ValueError: bad input, in one line that names the flag and what to do.
        PushError: with --push_to_hub, the Hub refuses the token or the name.
    """
    runs, options = parse(argv, recipes)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > runs[0].args.world_size:  # each would train alone, on all the data, into the same folder
        raise ValueError(
            f"{started} processes were started, and the Trainer sees {runs[0].args.world_size}; on the CPU add "
            "--use_cpu true, elsewhere start them with torchrun or accelerate launch"
        )
    for run in runs:
        if run.args.process_index == 0:  # the others may be late, and would find what it has written since
            check_folder(run, options)
    if options.resume and not Path(options.output_dir).exists():
        raise ValueError(f"--resume: there is no {options.output_dir}; give the --output_dir of the run to go on with")
    check_runs(runs)
    for run in runs:
        refuse_data_parallel(run.args)
    console = Console(quiet=runs[0].args.process_index != 0, emoji=False)
    data, splits = load(runs, console)
    for run in runs:
        if run.args.push_to_hub and run.args.process_index == 0:
            # The last of the checks, since it leaves something there: whether the token may write.
            with hub_errors(run.args.hub_model_id):
                HfApi().create_repo(run.args.hub_model_id, private=run.args.hub_private_repo, exist_ok=True)
    command = f"gd-plugin train {shlex.join(publishable_words(argv))}"
    return Job(runs, data, splits, Path(options.output_dir), options.overwrite, command, console)


def check_runs(runs: list[Run]) -> None:
    """What can be checked without data. Raises ``ValueError``, one line that names the flag."""
    for run in runs:
        _check_arguments(run.args)
        if run.args.hub_token:  # out of the arguments, which the Trainer pickles beside every checkpoint
            os.environ["HF_TOKEN"], run.args.hub_token = run.args.hub_token, None
        if run.args.push_to_hub:
            _check_push(run, len(runs))
        if run.model.loss != "gd":
            baseline(run.model.loss)
        if run.trace_samples < 0 or (run.trace_samples and run.args.world_size > 1):
            raise ValueError(
                f"--trace_samples {run.trace_samples} in {run.args.world_size} processes: give a number that is not "
                "negative, and one process"
            )


def load(runs: list[Run], console: Console) -> tuple[ClassificationData, list[torch.utils.data.Dataset]]:
    """The data that all the runs share, and its three splits prepared for their model.

    Raises:
        ValueError: data or model that cannot be had, or that do not fit each other or a run; one line.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # one bar of our own over all runs
    datasets.disable_progress_bars()
    with console.status("Loading the data and the model"):
        data = load_data(runs[0].data)
        model, processor = build_model(runs[0].model, data)
    for run in runs:
        _check_config(run.args, len(data.train), len(data.label_names))
    console.print(
        f"{data.name}: {len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test samples "
        f"(tested on: {data.tested_on}), {len(data.label_names)} classes\n"
        f"{runs[0].model.model}: {sum(p.numel() for p in model.parameters()):,} parameters",
        soft_wrap=True,
        markup=False,
    )
    with console.status("Preparing the data"):
        if data.kind == "text":
            if runs[0].data.augmentation != "none":
                raise ValueError(f"--augmentation {runs[0].data.augmentation} is for images, {data.name} holds text")
            splits = [PreparedTexts(split, processor) for split in (data.train, data.validation, data.test)]
        else:
            splits = [PreparedImages(split, processor) for split in (data.train, data.validation, data.test)]
    _check_model(model, processor, splits[0], runs[0].model.model)
    if any(run.trace_samples for run in runs):
        find_head(model)
    return data, splits


@dataclass
class Job:
    """Checked input of `gd-plugin train`; nothing is trained or written before `run`."""

    runs: list[Run]
    data: ClassificationData
    splits: list[torch.utils.data.Dataset]
    output_dir: Path
    overwrite: bool
    command: str
    console: Console

    def run(self) -> list[dict]:
        """Train what is not complete yet, write records and pictures, print the table; returns the records.

        Raises:
            Interrupted: Ctrl-C.
            PushError: with --push_to_hub; the trained models are whole, and --resume pushes them.
        """
        with progress(self.console, len(self.runs)) as bars, _stop_on_interrupt() as stop:
            records = []
            for run in self.runs:
                records.append(self._run_one(run, bars, stop))
                bars.finished(records[-1])
        if self.runs[0].args.process_index == 0:
            with _full_disk(self.output_dir):
                draw(records, self.output_dir, self.console)
            print_table(self.console, records)
            self.console.print(
                f"Models, records and pictures (curves.png, reliability.png): {self.output_dir}/",
                soft_wrap=True,
                markup=False,
            )
            if self.runs[0].args.push_to_hub:
                self._push()
        return records

    def _run_one(self, run: Run, bars: Bars, stop: _Stop) -> dict:
        """Train and evaluate one run, or read its record where it is already complete; returns the record."""
        args, record_path = run.args, run.folder / "record.json"
        if self.overwrite and args.process_index == 0:
            remove_run(run.folder)
        if record_path.exists() and not self.overwrite:  # only with --resume: `check_folder` has seen to it
            bars.skip(run.name)
            return read_record(record_path)
        run.folder.mkdir(parents=True, exist_ok=True)
        checkpoint, cut_short = (None, []) if self.overwrite else last_whole_checkpoint(run.folder)
        for path in cut_short:
            self.console.print(
                f"{path} was cut short and is left out; going on from {checkpoint or 'the beginning'}",
                soft_wrap=True,
                markup=False,
            )
        callbacks = [stop, bars.callback(run.name)]
        with _full_disk(run.folder):
            if args.process_index == 0:
                write_atomic(run.folder / SETTINGS_FILE, yaml.safe_dump(run.settings, sort_keys=False))
            checkpoint = None if checkpoint is None else str(checkpoint)
            record = fit(run, self.data, self.splits, self.command, callbacks, checkpoint)
            if args.process_index == 0:
                draw([record], run.folder, self.console)
                write_json(record_path, record)  # last: a record says that the run is complete
        return record

    def _push(self) -> None:
        for run in self.runs:
            card = run.folder / "README.md"
            if not card.is_file() or is_ours(card):
                write_run_card(run.folder)
            try:
                url = push(run.folder, _repository(run), run.args.hub_private_repo)
            except (ValueError, OSError) as error:
                raise PushError(str(error)) from error
            self.console.print(f"{run.name}: {url}", soft_wrap=True, markup=False)


@contextmanager
def _full_disk(folder: Path):
    """A full disk as one line: each library has an error of its own for it."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        # Other libraries than Python's say it in a text of their own.
        written = isinstance(error, (OSError, RuntimeError, SafetensorError))
        if full or (written and shutil.disk_usage(folder).free < _LITTLE_SPACE):
            raise FullDisk(f"no space left for {folder}; make some, and go on with --resume") from error
        raise


def _check_push(run: Run, runs: int) -> None:
    """Before training, not after it."""
    args = run.args
    check_token()
    try:
        validate_repo_id(_repository(run))
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id {_repository(run)}: {error}") from None
    # At the end alone: what the Trainer pushes in between would be a record of a run that is not complete.
    args.hub_strategy = HubStrategy.END
    if args.hub_revision:
        raise ValueError("--hub_revision: models are pushed to the main branch; leave it out")
    if args.hub_model_id and runs > 1:
        raise ValueError(
            f"--hub_model_id {args.hub_model_id}: {runs} runs would take each other's place there; leave it out, and "
            "each is named after its folder, or push one with gd-plugin push"
        )
    args.hub_model_id = _repository(run)


def _repository(run: Run) -> str:
    """The output folder's name, as the Trainer's own choice; one of several runs has both names."""
    folder = run.folder.resolve()
    return run.args.hub_model_id or (f"{folder.parent.name}-{folder.name}" if run.of_several else folder.name)


def _check_arguments(args: GradientDecayTrainingArguments) -> None:
    """What `TrainingArguments` accepts and the Trainer stumbles over."""
    for name in _AT_LEAST_1:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name, below in _NUMBERS.items():
        value = getattr(args, name)
        if value is None or (name == "max_grad_norm" and value == math.inf):  # which clips nothing
            continue
        if not math.isfinite(value):
            raise ValueError(f"--{name} must be finite, got {value}")
        if value < 0:
            raise ValueError(f"--{name} must not be negative, got {value}")
        if value >= below:
            raise ValueError(f"--{name} must be less than {below}, got {value}")
    if args.save_strategy == "steps" and not args.save_steps:
        raise ValueError("--save_steps must be greater than 0 with --save_strategy steps, got 0")
    if not 0 <= args.label_smoothing_factor <= 1:
        raise ValueError(f"--label_smoothing_factor must be in [0, 1], got {args.label_smoothing_factor}")
    if args.gd_fused_linear:
        raise ValueError("--gd_fused_linear is for language models, gd-plugin train is for classifiers; leave it out")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        raise ValueError(f"--num_train_epochs must be greater than 0, got {args.num_train_epochs}")
    if args.dataloader_persistent_workers:
        raise ValueError(
            "--dataloader_persistent_workers: the Trainer would test on the validation split, whose workers it keeps; "
            "leave it out"
        )
    for name, what in (
        ("save_only_model", "a training could not go on from such checkpoints"),
        ("ignore_data_skip", "a training that goes on would see other batches"),
    ):
        if getattr(args, name):
            raise ValueError(f"--{name}: {what}; leave it out")
    best = args.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in ("loss", *METRICS):
        raise ValueError(f"--metric_for_best_model {best}: the metrics are loss, {', '.join(METRICS)}")
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"--report_to {' '.join(args.report_to)}: {error}") from error
    _check_optimizer(args)


def _check_optimizer(args: GradientDecayTrainingArguments) -> None:
    """Optimizer and schedule for one number: the Trainer makes them when there are files in the folder already."""
    if any(name in str(args.optim) for name in _NEED_A_MODEL):
        return
    flags = ("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs")
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            return  # a function that wants the whole model
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, args.lr_scheduler_kwargs or {})
    except (AttributeError, TypeError, ValueError) as error:
        given = [f"--{name} {getattr(getattr(args, name), 'value', getattr(args, name))}"
                 for name in flags if getattr(args, name)]  # fmt: skip
        raise ValueError(f"{', '.join(given)}: {type(error).__name__}: {error}") from error


def _check_model(model: torch.nn.Module, processor, split: torch.utils.data.Dataset, name: str) -> None:
    """A batch of one sample: what does not fit together (sizes, channels, model_args) shows here, not in training."""
    collate = default_data_collator if isinstance(split, PreparedImages) else DataCollatorWithPadding(processor)
    try:
        with torch.no_grad():
            model.eval()(**collate([split[0]]))
    except Exception as error:  # any that a layer may raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"--model {name} does not take these data, or lacks other arguments: {reason}") from error


def _check_config(args: GradientDecayTrainingArguments, samples: int, num_classes: int) -> None:
    """A warm-up longer than training, or a list for other classes, before the first of several runs starts."""
    if args.world_size > 1 and args.accelerator_config.even_batches is False:
        batches = math.ceil(samples / args.per_device_train_batch_size)
        if batches % args.world_size:
            raise ValueError(
                f"--accelerator_config even_batches false: the {batches} batches of an epoch do not come out even over "
                f"{args.world_size} processes, which would wait for each other forever; leave it out, or choose "
                "another --per_device_train_batch_size"
            )
    batches = samples / (args.per_device_train_batch_size * args.world_size)
    batches = max(1, math.floor(batches) if args.dataloader_drop_last else math.ceil(batches))
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    try:
        args.gd_config.resolve(total, per_epoch)
        args.gd_config.check_num_classes(num_classes)
    except ValueError as error:
        raise ValueError(with_gd_prefix(error)) from None


class _Stop(TrainerCallback):
    """Ends training with a checkpoint after the update that is under way, when asked to.

    Several processes are not asked within the same update. They agree after every tenth, so that none waits for one
    that has stopped.
    """

    def __init__(self) -> None:
        self.requested = self.agreed = False

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size == 1:
            self.agreed = self.requested
        elif state.global_step % _AGREE_EVERY == 0:
            self.agreed = bool(gather(torch.tensor([self.requested], device=args.device)).any())
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        # The Trainer also calls this where it stops within an epoch. An evaluation there would be slow, one point more
        # in the curves, and would draw random numbers: the second save would not go on to the same weights.
        if self.agreed and state.epoch % 1 and state.global_step < state.max_steps:
            control.should_evaluate = control.should_save = False


@contextmanager
def _stop_on_interrupt():
    """The first Ctrl-C asks `_Stop`, since within an update there is nothing whole to save; a second one kills."""
    stop = _Stop()
    previous = signal.getsignal(signal.SIGINT)
    # A launcher passes on to its processes what the terminal has sent to them already.
    same = _SAME_CTRL_C if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0.0
    first = 0.0

    def request(signum, frame):
        nonlocal first
        if not stop.requested:
            stop.requested, first = True, time.monotonic()
        if not same:
            signal.signal(signal.SIGINT, previous)
        elif time.monotonic() - first > same:
            signal.signal(signal.SIGINT, previous)
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
