"""Flags and recipes of `gd-plugin train` and `study`: one parser, `HfArgumentParser`, reads and checks both.

A recipe is a YAML file of the same names as the flags. ``runs`` in it maps a name to what differs for that run, and
``study`` does the same for the methods of a study::

    dataset: digits
    model: timm:test_efficientnet
    runs:
      cross-entropy: {gd_beta: 1}
      warm-up: {gd_beta: 5, gd_beta_start: 0.01, gd_warmup_ratio: 0.5}

A ``defaults.yaml`` beside a recipe holds what the recipe does not say.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from .config import GradientDecayConfig
from .hf import GradientDecayTrainingArguments
from .reading import load_json, load_yaml

__all__ = ["DATASET_HELP", "DataArguments", "ModelArguments", "Run", "RunArguments", "json_mapping", "parse"]

DATASET_HELP = "a data set of the Hub (ylecun/mnist), a local folder, or `digits` (built in)"
# Where `gd-plugin train` differs from TrainingArguments: a run evaluates and saves after every epoch.
DEFAULTS = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 10,
    "report_to": ["none"],
    "disable_tqdm": True,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}
# What a run is asked to do, as opposed to what it is.
NOT_SETTINGS = ("output_dir", "overwrite", "resume", "runs", "study", "methods", "classes", "hub_token", "push_to_hub",
                "hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision")  # fmt: skip
OF_STUDY = ("seeds", "jobs", "executor")
PARENT_FOLDER = {"runs": "runs", "study": "studies"}
# Of TrainingArguments, which reads what begins with a brace as JSON, and does not say which flag is wrong.
_JSON_FLAGS = ("accelerator_config", "fsdp_config", "deepspeed", "activation_checkpointing_kwargs",
               "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")  # fmt: skip
_MAX_FOLDER_NAME = 100  # characters of a run's folder; file systems take 255 bytes


@dataclass
class DataArguments:
    """Which data set, and which of its columns and splits."""

    _argument_group_name = "data"

    dataset: str | None = HfArg(default=None, help=f"The data: {DATASET_HELP}.")
    data_dir: str | None = HfArg(
        default=None, help="Local folder with a copy of --dataset, which is then not downloaded."
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of a Hub data set, e.g. cropped_digits.")
    image_column: str | None = HfArg(default=None, help="Image column; by default found by its type.")
    text_column: str | None = HfArg(default=None, help="Text column; by default found by its type.")
    label_column: str | None = HfArg(default=None, help="Label column; by default found by its type or name.")
    train_split: str = HfArg(default="train", help="Split to train on.")
    validation_split: str | None = HfArg(
        default=None, help="Split evaluated after every epoch; by default `validation`, or else cut from training."
    )
    validation_fraction: float = HfArg(
        default=0.1, help="Part of the training split that is cut off where there is no validation split."
    )
    test_split: str | None = HfArg(
        default=None, help="Split for the final metrics; by default `test`, or else the validation split."
    )
    classes: list[str] | None = HfArg(
        default=None, help="Names of the classes, in any order: data with others are refused. Leave it out for any."
    )
    augmentation: Literal["none", "crop", "crop_flip"] = HfArg(
        default="none",
        help="Of training images, on the device: crop is a random shift by up to an eighth of the size, crop_flip also "
        "mirrors half of them.",
    )
    max_train_samples: int | None = HfArg(
        default=None,
        help="Use only the first samples of the training split, after the validation split is cut from it.",
    )
    max_eval_samples: int | None = HfArg(
        default=None, help="Use only the first samples of the validation and of the test split."
    )


@dataclass
class ModelArguments:
    """Which model."""

    _argument_group_name = "model"

    model: str | None = HfArg(
        default=None,
        help="A local folder, a Hub name (google/vit-base-patch16-224, timm/resnet18.a1_in1k), or timm:ARCHITECTURE "
        "for an untrained timm model.",
    )
    image_size: int | None = HfArg(
        default=None, help="Height and width of a timm:ARCHITECTURE's input in pixels; by default its own."
    )
    model_args: str | None = HfArg(
        default=None, help="More arguments of timm.create_model for timm:ARCHITECTURE, as JSON: '{\"img_size\": 32}'."
    )
    loss: Literal["gd", "focal", "poly1"] = HfArg(
        default="gd",
        help="The training loss: gd, the gradient-decay loss, or to compare it with: focal (Lin et al. "
        "2017, gamma 2) and poly1 (Leng et al. 2022, epsilon 2, needs timm >= 1.0.31).",
    )


@dataclass
class RunArguments:
    """What to do with the output folder, and several runs side by side."""

    _argument_group_name = "run"

    runs: str | None = HfArg(
        default=None,
        help="Several runs side by side, JSON of name -> what differs: "
        '\'{"ce": {"gd_beta": 1}, "gd": {"gd_beta": 5}}\'.',
    )
    trace_samples: int = HfArg(
        default=0, help="Follow this many training samples epoch by epoch, for `gd-plugin diagnose`."
    )
    study: str | None = HfArg(default=None, help="The methods that `gd-plugin study` compares, in the form of --runs.")
    methods: list[str] | None = HfArg(default=None, help="Of --study, only these methods, by name.")
    overwrite: bool = HfArg(default=False, help="Replace a run that is already in the output folder.")
    resume: bool = HfArg(default=False, help="Go on from the last checkpoint in the output folder.")


@dataclass
class Run:
    """One training: its checked arguments, and what they were asked to be."""

    name: str
    args: GradientDecayTrainingArguments
    settings: dict[str, Any]
    data: DataArguments
    model: ModelArguments
    trace_samples: int
    words: list[str]  # what was parsed
    of_several: bool  # with a folder of its own in the output folder

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)


class _Parser(HfArgumentParser):
    """An argument parser whose errors are one line, raised and not printed with the usage of 150 flags."""

    def __init__(self, grid: str = "runs") -> None:
        self.command = "gd-plugin study" if grid == "study" else "gd-plugin train"
        super().__init__(
            [DataArguments, ModelArguments, RunArguments, GradientDecayTrainingArguments],
            prog="gd-plugin train",
            usage="gd-plugin train [RECIPE] [--flag value ...]",
            description="Fine-tune a classifier with the gradient-decay loss. RECIPE is a YAML file of the flags "
            "below, or the name of one that comes with the package (digits). Flags override the recipe.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.set_defaults(**DEFAULTS)

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            message = f"{unknown[1]} is not a flag of {self.command}{self.nearest(unknown[1].lstrip('-'))}"
        raise ValueError(message)

    def nearest(self, name: str) -> str:
        name = name.replace("-", "_")
        if name in OF_STUDY and self.command != "gd-plugin study":
            return ", but of gd-plugin study"
        known = [action.dest for action in self._actions] + (
            list(OF_STUDY) if self.command == "gd-plugin study" else []
        )
        near = difflib.get_close_matches(name, known, n=1)
        return f"; did you mean {near[0]}?" if near else "; --help lists them"


def parse(argv: list[str], recipes: Path, grid: str = "runs") -> tuple[list[Run], argparse.Namespace]:
    """Words of the command line to checked runs.

    Args:
        grid: the flag that names the runs: ``"runs"``, or ``"study"``.

    Raises:
        ValueError: one line that names the flag.
    """
    parser = _Parser(grid)
    words = list(argv)
    recipe_name = None
    if words and not words[0].startswith("-"):
        path = _find_recipe(words.pop(0), recipes)
        recipe_name = path.stem
        words = _read_recipe(path, parser) + words
    options = parser.parse_args(words)
    if options.overwrite and options.resume:
        raise ValueError("--overwrite and --resume contradict each other; keep one")
    if options.output_dir == "":
        raise ValueError("--output_dir is empty; name a folder, or leave it out")
    if options.output_dir == parser.get_default("output_dir"):
        # A data set `..` or a recipe `...yaml` must not lead out of the folder of all runs.
        name = recipe_name or Path(str(options.dataset)).name
        options.output_dir = str(Path(PARENT_FOLDER[grid]) / (name.strip(".") or "run"))

    given = getattr(options, grid)
    if given is None and grid == "study":
        raise ValueError(
            'no methods to compare: give a recipe with `study`, or --study \'{"ce": {"gd_beta": 1}, ...}\''
        )
    variants = {"run": {}} if given is None else json_mapping(grid, given)
    # The recipe's choice is one from the recipe's study.
    own_study = any(word.split("=")[0] == "--study" for word in argv)
    own_methods = any(word.split("=")[0] == "--methods" for word in argv)
    if grid == "study" and options.methods is not None and (own_methods or not own_study):
        variants = _chosen(variants, options.methods)
    _check_variants(variants, argv, grid)
    runs, folders = [], set()
    for name, differences in variants.items():
        folder = Path(options.output_dir)
        if given is not None:
            folder /= re.sub(r"[^a-z0-9.]+", "-", name.lower())[:_MAX_FOLDER_NAME].strip("-.") or "run"
        if folder in folders:
            raise ValueError(f"{grid}: two runs would share the folder {folder}; give them other names")
        folders.add(folder)
        of_run = words + _flags(differences, parser, f"{grid}: {name}") + [f"--output_dir={folder}"]
        try:
            runs.append(parse_one(name if given is not None else None, of_run, parser))
        except ValueError as error:
            raise ValueError(f"{grid}: {name}: {error}" if differences else str(error)) from None
    return runs, options


def parse_one(name: str | None, words: list[str], parser: _Parser | None = None) -> Run:
    """The run that these words, of which no recipe is part any more, ask for; without a name, one after its loss."""
    parser = parser or _Parser()
    given = vars(parser.parse_args(words))
    for flag in _JSON_FLAGS:
        if str(given.get(flag)).startswith("{"):
            json_mapping(flag, given[flag])
    try:
        data, model, what, args = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}; one of the Trainer's flags is wrong") from error
    if model.loss != "gd" and (args.gd_config != GradientDecayConfig() or args.label_smoothing_factor):
        raise ValueError(
            f"--loss {model.loss} knows neither the gd_ flags nor label_smoothing_factor; remove them, or use --loss gd"
        )
    defaults = vars(parser.parse_args([]))
    settings = {k: v for k, v in given.items() if v != defaults[k] and k not in NOT_SETTINGS}
    several = name is not None
    return Run(name or _describe(args, model), args, settings, data, model, what.trace_samples, words, several)


def _chosen(variants: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    for name in methods:
        if name not in variants:
            near = difflib.get_close_matches(name, variants, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(variants)}"
            raise ValueError(f"--methods {name!r}: the study has no such method; {hint}")
    if not methods:
        raise ValueError("--methods is empty, so there is nothing to compare; name some, or leave it out")
    return {name: variants[name] for name in variants if name in methods}  # the first is what others are compared with


def _check_variants(variants: dict[str, Any], argv: list[str], grid: str) -> None:
    # All runs share the prepared data, so that they can be compared.
    shared = {f.name for c in (DataArguments, ModelArguments, RunArguments) for f in fields(c)} | {"output_dir"}
    shared -= {"loss"}
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    for name, differences in variants.items():
        if not isinstance(differences, dict):
            raise ValueError(f"{grid}: {name} must map flags to values, got {differences!r}")
        for key in differences:
            if key == "seed" and grid == "study":
                raise ValueError(f"study: {name} sets seed, which --seeds sets; remove it")
            if key in shared:
                raise ValueError(f"{grid}: {name} sets {key}, which all runs share; give it beside {grid}")
            if key in given:
                raise ValueError(f"--{key} is set by the run {name!r} of the recipe; leave it out, or give --{grid}")


def _find_recipe(name: str, recipes: Path) -> Path:
    for path in (Path(name), recipes / name, recipes / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in recipes.glob("*.yaml") if p.stem != "defaults"))
    raise ValueError(
        f"there is no recipe {name}; give a YAML file, or one of those that come with the package: {known}"
    )


def _read_recipe(path: Path, parser: _Parser) -> list[str]:
    """The words of a recipe, after those of the defaults beside it: of a flag given twice the last one counts."""
    defaults = path.with_name("defaults.yaml")
    words = []
    for file in (defaults, path) if defaults.is_file() and path.name != "defaults.yaml" else (path,):
        try:
            values = load_yaml(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is not a YAML file: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} must map flags to values, such as `dataset: digits`")
        words += _flags(values, parser, str(file))
    return words


def _flags(values: dict[str, Any], parser: _Parser, where: str) -> list[str]:
    """A mapping as words of the command line, so that one parser converts and checks both."""
    known = {action.dest for action in parser._actions}
    words = []
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}: {key} is not a flag of gd-plugin train{parser.nearest(str(key))}")
        if value is None:
            continue
        if key in ("runs", "study", "model_args") and not isinstance(value, (dict, str)):
            raise ValueError(f"{where}: {key} must map names to values, such as `runs: {{ce: {{gd_beta: 1}}}}`")
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            try:
                words.append(f"--{key}={json.dumps(value)}")
            except TypeError as error:  # YAML has dates, and keys that are no text
                raise ValueError(f"{where}: {key}: {error}; put it in quotes") from None
        else:
            words.append(f"--{key}={value}")
    return words


def json_mapping(flag: str, text: str) -> dict:
    try:
        value = load_json(text)
    except ValueError as error:
        raise ValueError(f"--{flag} is not JSON ({error}): {text[:80]}") from None
    if flag in PARENT_FOLDER and value == {}:
        raise ValueError(f"--{flag} is empty: name at least one, such as {{five: {{gd_beta: 5}}}} in a recipe")
    if not isinstance(value, dict):
        raise ValueError(f"--{flag} must be a JSON object, got {text[:80]}")
    return value


def _describe(args: GradientDecayTrainingArguments, model: ModelArguments) -> str:
    """A name for a single run: what its loss is."""
    if model.loss != "gd":
        return model.loss
    config = args.gd_config
    start, beta = (f"{b:g}" if isinstance(b, float) else b for b in (config.beta_start, config.beta))
    if start is not None:
        return f"beta {start} to {beta}"
    return "cross-entropy" if config.beta == 1.0 else f"beta {beta}"
