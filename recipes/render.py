"""What is written from the committed records of `recipes/results`: their tables, those of README.md, `model_cards/`.

python recipes/render.py           writes them
python recipes/render.py --check   writes nothing, and names what differs; CI runs this
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from scipy import stats

from gd_plugin import markdown
from gd_plugin.bench import growth, peak_in_mib, step_ratio
from gd_plugin.bench import summary as summary_of_times
from gd_plugin.card import study_card
from gd_plugin.record import STUDY_FILE, hardware, json_text, read_record, write_atomic
from gd_plugin.stats import COLUMNS, Method, StudyResults, Summary, read_study
from gd_plugin.study_report import csv_table, difference, markdown_tables, mean_and_sd

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "recipes/results"
SHOWN = ("cross-entropy", "beta 0.1", "beta 5", "0.01 to 5 over 50%", "label smoothing 0.1")
PICTURES = ("loss", "accuracy_ece", "reliability")
KEYS = ("accuracy", "nll", "ece", "confidence_gap", "temperature/ece")


def studies() -> dict[str, StudyResults]:
    """By the name of their recipe."""
    return {path.parent.name: read_study(path.parent) for path in sorted(RESULTS.glob(f"*/{STUDY_FILE}"))}


def summary(name: str, study: StudyResults) -> str:
    """The README's table of one study: some of its methods."""
    head = [f"{name}, {study.tested_on} split", "n", *(COLUMNS[key].title for key in KEYS)]
    rows = [
        [method.name, len(method.records), *(mean_and_sd(key, method.summaries[key]) for key in KEYS)]
        for method in study.methods
        if method.name in SHOWN
    ]
    return markdown.table(head, rows)


def advice(found: dict[str, StudyResults]) -> str:
    """Per study: which method the validation split would have chosen, and what it then did on the test split."""
    rows = []
    for name, study in found.items():
        epochs = next(iter(study.baseline.records.values()))["epochs"][-1]["epoch"]
        for goal, key in (("accuracy", "eval_accuracy"), ("NLL", "eval_nll"), ("ECE", "eval_ece")):
            best = study.chosen(key)
            cells = [difference(column, best.summaries[column]) for column in ("accuracy", "nll", "ece")]
            if best is study.baseline:
                cells = ["the baseline"] * 3
            rows.append([name, f"{epochs:g}", goal, best.name, *cells])
    return markdown.table(["recipe", "epochs", "chosen for", "method", "accuracy %", "NLL", "ECE %"], rows)


def gaps(found: dict[str, StudyResults]) -> str:
    """Per study: how overconfident cross-entropy is, and how much more or less so two betas are."""
    rows = []
    for name, study in found.items():
        others = [method for beta in ("beta 0.1", "beta 5") for method in study.methods if method.name == beta]
        cells = [difference("confidence_gap", method.summaries["confidence_gap"]) for method in others]
        rows.append([name, mean_and_sd("confidence_gap", study.baseline.summaries["confidence_gap"]), *cells])
    return markdown.table(["recipe", "gap %, cross-entropy", "beta 0.1 minus that", "beta 5 minus that"], rows)


def claims(found: dict[str, StudyResults]) -> str:
    """Per study: which betas and warm-ups are significantly better or worse than cross-entropy."""
    keys = {"accuracy": 1, "early_accuracy": 1, "train_cross_entropy": -1, "ece": -1, "temperature/ece": -1}
    rows = []
    for name, study in found.items():
        ours = [m for m in study.methods[1:] if m.family in ("fixed beta", "warm-up")]
        rows.append([name, len(ours), *(_significant(ours, key, better) for key, better in keys.items())])
    titles = ["accuracy", "early accuracy", "training cross-entropy", "ECE", "ECE, temperature"]
    return markdown.table(["recipe", "betas and warm-ups", *titles], rows)


def _significant(methods: list[Method], key: str, better: int) -> str:
    """``better: beta 2; beta 5. Worse: none``, of many their number; ``better``: the sign of what is for the better."""
    certain = [method for method in methods if method.summaries[key].q < 0.05]
    parts = []
    for sign in (better, -better):
        names = [method.name for method in certain if sign * method.summaries[key].difference > 0]
        parts.append("; ".join(names) if 0 < len(names) < 6 else str(len(names) or "none"))
    return f"better: {parts[0]}. Worse: {parts[1]}"


def warmups(found: dict[str, StudyResults]) -> str:
    """Per study: its linear warm-ups from 0.01 to beta 5, beside beta 5 from the first update on."""
    keys = ("accuracy", "ece", "confidence_gap", "early_accuracy")
    rows = [
        [name, pair.warmup.name, *(difference(key, pair.summaries[key]) for key in keys)]
        for name, study in found.items()
        for pair in study.pairs
        if (pair.warmup.gd["beta_start"], pair.fixed.gd["beta"], pair.warmup.gd["schedule"]) == (0.01, 5.0, "linear")
    ]
    return markdown.table(["recipe", "warm-up", "accuracy %", "ECE %", "gap %", "early accuracy %"], rows)


def routes() -> str:
    """The same recipe by the Trainer and by timm's train.py: mean, deviation, and the difference by Welch's t-test."""
    keys, rows = ("accuracy", "nll", "ece"), []
    for beta in (1, 5):
        found = {
            route: [read_record(path) for path in sorted(RESULTS.glob(f"both_routes/{route}/beta-{beta}-*.json"))]
            for route in ("trainer", "timm")
        }
        values = {
            route: {key: [record["final"][key] for record in records] for key in keys}
            for route, records in found.items()
        }
        for route, of_route in values.items():
            cells = [
                mean_and_sd(key, Summary({}, len(v), statistics.mean(v), statistics.stdev(v)))
                for key, v in of_route.items()
            ]
            rows.append([f"beta {beta}, {route}", len(found[route]), *cells])
        cells = [unpaired(key, values["trainer"][key], values["timm"][key]) for key in keys]
        rows.append([f"beta {beta}, trainer minus timm", "", *cells])
    return markdown.table(["route", "n", "accuracy %", "NLL", "ECE %"], rows)


def unpaired(key: str, first: list[float], second: list[float]) -> str:
    """The mean of the first minus that of the second, with Welch's 95% interval and p, which is not corrected."""
    test = stats.ttest_ind(first, second, equal_var=False)
    low, high = test.confidence_interval(0.95)
    shown = Summary({}, difference=statistics.mean(first) - statistics.mean(second), low=float(low), high=float(high))
    return f"{difference(key, shown)}, p {test.pvalue:.2f}"


def diagnosis() -> str:
    """What `gd-plugin diagnose` said of the runs of recipes/digits_traced.yaml."""
    claims = json.loads((RESULTS / "digits_traced/diagnosis.json").read_bytes())["claims"]
    return "\n".join(f"- {name}: {markdown.plain(claim['conclusion'])}" for name, claim in claims.items())


def tables_of_times(result: dict) -> dict[str, str]:
    """Of a bench.json, by the part that they show."""
    blocks = {}
    for part in ("logits", "smoothing", "linear", "model"):
        cases = [case for case in result["cases"] if case["name"].startswith(part)]
        if not cases:
            continue
        base = next(iter(cases[0]["routes"]))
        found = [summary_of_times(case["routes"], base) for case in cases]
        rows = []
        for name, route in cases[0]["routes"].items():
            if "absent" in route:
                continue
            cells = []
            for case, ratios in zip(cases, found, strict=True):
                low, median, high = ratios[name]
                mib = peak_in_mib(case["routes"][name])
                mib = f", {mib} MiB" if mib else ""
                cells.append(f"{median:.2f} ({low:.2f} to {high:.2f}){mib}")
            rows.append([name, *cells])
        head = [f"time / {base}", *(case["name"].removeprefix(f"{part} ") for case in cases)]
        blocks[f"bench_{part}"] = markdown.table(head, rows)
    return blocks


def ratios_of_steps(result: dict) -> str:
    return "; ".join(
        f"of a {step['model']} of {step['parameters'] / 1e6:.1f} million weights, batch {step['batch']}, "
        f"{median:.3f} ({low:.3f} to {high:.3f})"
        for step in result["step"]
        for low, median, high in [step_ratio(step)]
    )


def bench() -> dict[str, str]:
    """What `python -m gd_plugin.bench` measured: a table of every part, and the rest."""
    result = json.loads((RESULTS / "bench/bench.json").read_bytes())
    alone = json.loads((RESULTS / "bench/alone.json").read_bytes())
    step = json.loads((RESULTS / "bench/step.json").read_bytes())
    blocks = {"bench_alone": tables_of_times(alone)["bench_logits"], **tables_of_times(result)}
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers", "timm"))
    blocks["bench_rest"] = (
        "A step of `GradientDecayTrainer` with a warm-up in units of the Trainer's with its own cross-entropy, median "
        f"and quartiles of blocks of steps in turns: {ratios_of_steps(result)}. Alone, in {step['rounds']} blocks: "
        f"{ratios_of_steps(step)}. From 10,000 classes to a million, time grows with their "
        f"number to the power of {growth(result['classes']):.2f}, that of `F.cross_entropy` to the power of "
        f"{growth(result['classes'], 'F.cross_entropy'):.2f}. Measured in {result['rounds']} rounds with beta "
        f"{result['beta']:g} on {hardware(result)}; {versions}; commit {result['commit'][:10]}."
    )
    return blocks


def evidence(name: str, study: StudyResults) -> str:
    """Every number of the card, unrounded, and where the records are that it is computed from."""
    content = {
        "records": f"recipes/results/{name}",
        "command": study.command,
        "seeds": study.seeds,
        "card_of": study.chosen("eval_nll").name,
        "methods": {
            method.name: {key: vars(method.summaries[key]) for key in COLUMNS if method.summaries[key].n}
            for method in study.methods
        },
    }
    return json_text(content)


def rendered() -> dict[Path, str]:
    """Every file that is written from the records, and what belongs in it."""
    found = studies()
    files = {}
    for name, study in found.items():
        files[RESULTS / name / "table.md"] = markdown_tables(study)
        files[RESULTS / name / "table.csv"] = csv_table(study)
        pictures = [f"../{(RESULTS / name).relative_to(ROOT)}/{picture}.png" for picture in PICTURES]
        files[ROOT / f"model_cards/{name}.md"] = study_card(study, pictures)
        files[ROOT / f"model_cards/{name}.json"] = evidence(name, study)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    blocks = {f"table: {name}": summary(name, study) for name, study in found.items()}
    blocks |= {
        "advice": advice(found),
        "gaps": gaps(found),
        "claims": claims(found),
        "warmups": warmups(found),
        "diagnosis": diagnosis(),
        "routes": routes(),
    }
    blocks |= bench()
    for marker in re.findall(r"<!-- (table: \w+|advice|gaps|claims|warmups|diagnosis|routes|bench_\w+) -->", text):
        # From the marker to the first empty line.
        pattern = rf"(<!-- {re.escape(marker)} -->\n)(?:[^\n]+\n)*"
        text = re.sub(pattern, lambda match, block=blocks[marker]: match[1] + block + "\n", text)
    files[readme] = text
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if something differs")
    check = parser.parse_args().check
    stale = {p: text for p, text in rendered().items() if not p.exists() or p.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if check:
            print(f"{path.relative_to(ROOT)} is not what the records say: python recipes/render.py", file=sys.stderr)
        else:
            write_atomic(path, text)
            print(path.relative_to(ROOT))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
