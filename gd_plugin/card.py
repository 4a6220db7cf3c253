"""Model cards, written from records alone: every number in them was measured and is in a file beside them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import markdown
from .calibration import is_useful
from .parser import Parser
from .record import STUDY_FILE, family, hardware, read_record, write_atomic

if TYPE_CHECKING:
    from .stats import StudyResults

__all__ = [
    "CITATION",
    "LICENSE_HELP",
    "UNKNOWN_DATA",
    "hyperparameters",
    "is_ours",
    "main",
    "run_card",
    "study_card",
    "write_run_card",
]

CITATION = """@article{zhang2024gradientdecay,
  title   = {Probability-Dependent Gradient Decay in Large Margin Softmax},
  author  = {Zhang, Siyuan and Xie, Linbo and Chen, Ying},
  journal = {arXiv preprint arXiv:2210.17145},
  year    = {2022}
}"""
LICENSE_HELP = (
    "apache-2.0 for a timm architecture trained from scratch; else none, since what it was fine-tuned from decides"
)
UNKNOWN_DATA = "unknown data"  # of a Trainer, which is not told a name
_OF_TIMM = (
    "model", "epochs", "batch_size", "grad_accum_steps", "opt", "lr", "weight_decay", "sched", "amp", "smoothing",
    "mixup", "cutmix", "model_ema", "world_size", "seed",
)  # fmt: skip
_NEEDED = (
    *(f"dataset.{key}" for key in ("name", "tested_on")), *(f"model.{key}" for key in ("name", "parameters")),
    *(f"gd.{key}" for key in ("beta", "beta_start", "schedule", "warmup_ratio", "warmup_steps", "warmup_epochs")),
    *(f"hardware.{key}" for key in ("cpu", "gpu", "torch_threads")),
    "versions", "python", "commit", "created", "command",
)  # fmt: skip
_MARK = "<!-- written by gd-plugin card -->"
_TEMPLATE = Path(__file__).parent / "card.md.jinja"
_PICTURES = {
    "curves": "Training curves",
    "loss": "Training loss of all methods",
    "accuracy_ece": "Accuracy against calibration error",
    "reliability": "Reliability diagram",
}
# Title, key in the record, scale, format; and the name and type of the metric in the card's metadata.
_METRICS = (
    ("accuracy %", "accuracy", 100, "{:.2f}", "accuracy"),
    ("NLL", "nll", 1, "{:.4f}", "nll"),
    ("Brier", "brier", 1, "{:.4f}", "brier_score"),
    ("ECE %", "ece", 100, "{:.2f}", "expected_calibration_error"),
    ("gap %", "confidence_gap", 100, "{:+.2f}", "confidence_gap"),
)


def main(argv: list[str]) -> int:
    """Run ``gd-plugin card`` with the words after the command, and return its exit code.

    Raises:
        ValueError: no run and no study, or a damaged record; one line.
        OSError: the folder cannot be written to.
    """
    parser = Parser(
        prog="gd-plugin card",
        description="Writes README.md, the model card for the Hub, into the folder of a run of gd-plugin train or of a "
        "study. Every number in it is from the records there.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN_OR_STUDY")
    parser.add_argument("--method", help="of a study; default: the one with the smallest NLL on the validation split")
    parser.add_argument("--license", help="of the model, an identifier of the Hub; default: " + LICENSE_HELP)
    options = parser.parse_args(argv)
    folder = options.folder
    if (folder / STUDY_FILE).is_file():
        from .stats import read_study

        pictures = [f"{name}.png" for name in _PICTURES if (folder / f"{name}.png").is_file()]
        path = folder / "README.md"
        write_atomic(path, study_card(read_study(folder), pictures, options.method, options.license))
    elif options.method is not None:
        raise ValueError(f"--method is for a study, and {folder} is none; leave it out")
    elif not (folder / "record.json").is_file():
        raise ValueError(
            f"{folder} holds neither record.json nor {STUDY_FILE}; give the folder of one run, or a study's"
        )
    else:
        path = write_run_card(folder, options.license)
    print(f"Model card: {path}")
    return 0


def write_run_card(folder: Path, license: str | None = None) -> Path:
    """Write the card of a run as README.md into its folder, beside the record and the pictures.

    Args:
        folder: of `gd-plugin train`, `gd-plugin timm` or a `GradientDecayTrainer`, with its ``record.json``; runs
            beside it on the same data are the ones it is compared with.
        license: of the model, an identifier of the Hub.

    Raises:
        ValueError, OSError: there is no record, or it cannot be read.
    """
    record = read_record(folder / "record.json", _NEEDED)
    siblings = []
    for path in sorted(folder.parent.glob("*/record.json")):
        with contextlib.suppress(ValueError):  # another program's file of that name
            if path.parent != folder:
                siblings.append(read_record(path, _NEEDED))
    siblings = [other for other in siblings if _comparable(other, record)]
    pictures = [f"{name}.png" for name in _PICTURES if (folder / f"{name}.png").is_file()]
    path = folder / "README.md"
    write_atomic(path, run_card(record, siblings, pictures, license))
    return path


def is_ours(path: Path) -> bool:
    """Whether a README.md is a card that was written here and may be written again."""
    return _MARK in path.read_text(encoding="utf-8", errors="replace")


def run_card(record: dict, siblings: list[dict], pictures: list[str], license: str | None = None) -> str:
    """The card of one run, as text.

    Args:
        record: as from `gd_plugin.record.read_record`.
        siblings: records of the runs that it is compared with, the baseline among them.
        pictures: files beside the card, named after what they show: ``curves.png``, ``reliability.png``.
        license: of the model, an identifier of the Hub.
    """
    dataset, final = record["dataset"], record["final"]
    best = record.get("best_step")
    when = "after the last epoch" if best is None else f"of the best checkpoint, that of update {best}"
    note = f"{_number(dataset.get('test'))} samples of the split {markdown.code(dataset['tested_on'])}, {when}"
    note += "; one run each, so that differences may be chance. " if siblings else ". "
    if any(key in final for _, key, *_ in _METRICS):
        rows = [
            [f"this model: {record['name']}" if r is record else r["name"], *_cells(r["final"])]
            for r in (record, *siblings)
        ]
        results = markdown.table(["run", *(title for title, *_ in _METRICS)], rows)
        note += "gap: confidence minus accuracy, positive is overconfident."
        if not any(family(r) == "fixed beta" and r["gd"]["beta"] == 1 for r in (record, *siblings)):
            note += " **No cross-entropy baseline was trained beside it.**"
    elif final:  # several evaluation sets, or metrics of a user's own
        results = markdown.table(["metric", "value"], [(k, "-" if v is None else f"{v:.6g}") for k, v in final.items()])
        note = note.rstrip()
    else:
        results, note = "It was not evaluated.", ""
    values = {key: final.get(key) for _, key, *_ in _METRICS}
    return _render(record, values, results, note, _temperature(record), pictures, [record["seed"]], license, use=True)


def study_card(study: StudyResults, pictures: list[str], method: str | None = None, license: str | None = None) -> str:
    """The card of a method of a study: mean and deviation over its seeds, beside all the others.

    Args:
        pictures: files beside the card, named after what they show.
        method: by name; by default the one with the smallest NLL on the validation split.
        license: of the model, an identifier of the Hub.

    Raises:
        ValueError: there is no such method.
    """
    from .study_report import difference, mean_and_sd  # and with it scipy, which a run's card can do without

    chosen = study.chosen("eval_nll") if method is None else next((m for m in study.methods if m.name == method), None)
    if chosen is None:
        raise ValueError(f"--method {method!r}: the methods are {', '.join(m.name for m in study.methods)}")
    record = next(iter(chosen.records.values()))
    shared = {key: value for key, value in record["config"].items() if key != "seed"}  # the card is of several
    record = {**record, "config": shared}
    keys = [key for _, key, *_ in _METRICS]
    rows = [
        [f"this method: {m.name}" if m is chosen else m.name, len(m.records)]
        + [mean_and_sd(key, m.summaries[key]) for key in keys]
        for m in study.methods
    ]
    base = study.baseline
    note = (
        f"Mean ± standard deviation over n seeds on {record['dataset']['test']:,} samples of the split "
        f"{markdown.code(study.tested_on)}, after the last epoch. gap: confidence minus accuracy, positive is "
        "overconfident."
    )
    if len(study.seeds) == 1:
        note += " One seed: no deviation can be given, and differences may be chance."
    if chosen is not base:
        compared = ", ".join(f"{title} {difference(key, chosen.summaries[key])}" for title, key, *_ in _METRICS[:4])
        note += f" Against {markdown.plain(base.name)}, paired by seed (95% interval, corrected p-value): {compared}."
    if method is None:
        note += " The method was chosen by its NLL on the validation split."
    after = [f"{title} {mean_and_sd(f'temperature/{key}', chosen.summaries[f'temperature/{key}'])}"
             for title, key in (("ECE %", "ece"), ("NLL", "nll"))]  # fmt: skip
    temperature = f"With the temperature fitted to the validation split, on the same test samples: {', '.join(after)}."
    head = ["method", "n", *(title for title, *_ in _METRICS)]
    values = {key: chosen.summaries[key].mean if chosen.summaries[key].n else None for key in keys}
    return _render(record, values, markdown.table(head, rows), note, temperature, pictures, study.seeds, license)


def _render(
    record: dict,
    values: dict[str, float | None],
    results: str,
    note: str,
    temperature: str,
    pictures: list[str],
    seeds: list[int],
    license: str | None,
    use: bool = False,
) -> str:
    name = f"{_short(record['model']['name'])} on {record['dataset']['name']}, {record['name']}"
    name = (record.get("card") or {}).get("model_name") or name
    metadata = _metadata(record, name, values, license)
    card = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        title=markdown.plain(name),
        summary=_summary(record),
        results=results,
        results_note=note,
        use=metadata.pipeline_tag if use else None,
        by_timm=metadata.library_name == "timm",
        pictures=[(_PICTURES[Path(file).stem], file) for file in pictures],
        loss=_loss(record),
        hyperparameters=markdown.table(["setting", "value"], hyperparameters(record).items()),
        temperature=temperature,
        samples=_number(record["dataset"].get("test")),
        reproduce=_reproduce(record, seeds),
        citation=CITATION,
    )
    return str(card).rstrip() + "\n"


def hyperparameters(record: dict) -> dict[str, Any]:
    """Those of a record's settings that say how it was trained: timm's train.py has two hundred more."""
    config = record["config"]
    if "opt" not in config:
        return config
    return {name: config[name] for name in _OF_TIMM if config.get(name) is not None}


def _comparable(other: dict, record: dict) -> bool:
    """Trained and tested on as many samples of the same data, if it is known which."""
    keys = ("name", "train", "test", "tested_on")
    same = all(other["dataset"].get(key) == record["dataset"].get(key) for key in keys)
    return same and record["dataset"]["name"] != UNKNOWN_DATA


def _number(samples: int | None) -> str:
    return "an unknown number of" if samples is None else f"{samples:,}"


def _short(model: str) -> str:
    return model.removeprefix("timm:").rsplit("/", 1)[-1]


def _metadata(record: dict, name: str, values: dict[str, float | None], license: str | None) -> ModelCardData:
    dataset, model, said = record["dataset"], record["model"]["name"], record.get("card") or {}
    task = said.get("task") or f"{dataset.get('kind', 'image')}-classification"
    base = model if "/" in model and ":" not in model else None
    if said:  # by a Trainer, which has looked whether it is a folder
        base = said.get("base_model")
    hub = dataset.get("hub") or ([dataset["name"]] if "/" in dataset["name"] else [])
    results = [
        EvalResult(
            task_type=task,
            dataset_type=(hub or [dataset["name"]])[0],
            dataset_name=dataset["name"],
            dataset_split=dataset["tested_on"],
            dataset_revision=dataset.get("revision"),
            metric_type=kind,
            metric_name=title.removesuffix(" %"),
            metric_value=values[key],
        )
        for title, key, _, _, kind in _METRICS
        if values.get(key) is not None
    ]
    by_timm = model.startswith("timm:") or record["model"].get("type") == "timm_wrapper"
    tags = ["gradient-decay", "calibration", "arxiv:2210.17145", *(["timm", "transformers"] if by_timm else [])]
    return ModelCardData(
        language=said.get("language"),
        license=license or said.get("license") or ("apache-2.0" if _from_scratch(record) else None),
        library_name=said.get("library") or ("timm" if by_timm else "transformers"),  # a timm model is loaded by both
        pipeline_tag=task,
        datasets=hub or None,
        base_model=base,
        tags=[*tags, *(tag for tag in said.get("tags") or () if tag not in tags)],
        metrics=["accuracy"] if values.get("accuracy") is not None else None,
        model_name=name,
        eval_results=results,
    )


def _from_scratch(record: dict) -> bool:
    """Certainly: by gd-plugin's own commands, from an architecture of timm. The license of anybody else's weights, or
    of those that a script began with, is not ours to say."""
    config = record["config"]
    begun = any(config.get(key) for key in ("pretrained", "initial_checkpoint", "pretrained_path"))
    return record["model"]["name"].startswith("timm:") and not begun and not record.get("card")


def _summary(record: dict) -> str:
    data, model = record["dataset"], record["model"]
    how = "trained" if _from_scratch(record) or record.get("card") else "fine-tuned"
    if base := (record.get("card") or {}).get("base_model"):
        how = f"fine-tuned from {markdown.code(base)}"
    other = "another loss for comparison with " if family(record) == "other loss" else ""
    return (
        f"{markdown.code(model['name'])} ({model['parameters']:,} weights), {how} on {markdown.code(data['name'])} "
        f"({_number(data.get('train'))} samples) with {other}the gradient-decay softmax cross-entropy of "
        "[arXiv 2210.17145](https://arxiv.org/abs/2210.17145) as implemented by `gd_plugin`."
    )


def _loss(record: dict) -> str:
    if record.get("loss", "gd") != "gd":
        return f"The loss is {markdown.code(record['loss'])}, for comparison."
    gd = record["gd"]
    if gd["beta_start"] is None:
        text = f"beta is {gd['beta']} throughout" + (": cross-entropy." if gd["beta"] == 1 else ".")
    else:
        length = next(
            f"{gd[key]:g} {unit}"
            for key, unit in (("warmup_ratio", "of training"), ("warmup_steps", "updates"), ("warmup_epochs", "epochs"))
            if gd[key]
        )
        text = f"beta goes from {gd['beta_start']} to {gd['beta']} over {length} ({gd['schedule']}), and stays there."
    return f"{text} beta < 1 keeps the gradient of confident samples large, beta > 1 lets them go early."


def _temperature(record: dict) -> str:
    t, final = (record.get("calibrated") or {}).get("temperature") or {}, record["final"]
    if any(part.get(key) is None for part in (t, final) for key in ("ece", "nll")) or t.get("temperature") is None:
        return "No temperature was fitted."
    if not is_useful(t["temperature"]):
        return (
            f"The temperature fitted to the validation split is {t['temperature']:.4g}: the logits say next to nothing "
            "there, or are all but certain. It is not stored."
        )
    if t["temperature"] == 1:
        return "Every sample of the validation split is right, which leaves no temperature to fit: it is 1."
    return (
        f"The temperature fitted to the validation split is {t['temperature']:.4g}: `softmax(logits / "
        f"{t['temperature']:.4g})` has an ECE of {100 * t['ece']:.2f} % and an NLL of {t['nll']:.4f} on the same test "
        f"samples, against {100 * final['ece']:.2f} % and {final['nll']:.4f} without it. It is "
        "`gd_temperature` in the configuration, and applied on request: `from gd_plugin import apply_temperature; "
        "apply_temperature(pipe.model)`."
    )


def _reproduce(record: dict, seeds: list[int]) -> str:
    rows: list[tuple[str, Any]] = [
        ("seed" if len(seeds) == 1 else "seeds", ", ".join(map(str, seeds))),
        ("commit of gd_plugin", record["commit"] or "an installed package"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ("python", record["python"]),
        ("hardware", hardware(record)),
        ("wall time of a run", f"{record['wall_time_s']:.0f} s"),
        *([("energy of a run", f"{record['energy_kwh']:.3g} kWh (codecarbon)")] if record.get("energy_kwh") else []),
        ("date", record["created"]),
    ]
    # Indented: no backtick of a flag's value ends it.
    return f"    {markdown.one_line(record['command'])}\n\n" + markdown.table(["of the run", "value"], rows)


def _cells(final: dict) -> list[str]:
    return [
        "-" if key not in final else "diverged" if final[key] is None else form.format(final[key] * scale)
        for _, key, scale, form, _ in _METRICS
    ]
