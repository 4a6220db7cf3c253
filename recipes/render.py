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
from gd_plugin.stats import COLUMNS, StudyResults, Summary, correct, read_study
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


def claims(found: dict[str, StudyResults]) -> str:
    """Per study: confidence at three betas, and which betas and warm-ups differ significantly from cross-entropy."""
    rows = []
    for name, study in found.items():
        methods = {method.name: method for method in study.methods}
        gaps = [methods[method].summaries["confidence_gap"] for method in ("beta 0.1", "cross-entropy", "beta 5")]
        ours = [m for m in study.methods[1:] if m.family in ("fixed beta", "warm-up")]

        def significant(key: str, better: int, ours: list = ours) -> str:
            certain = [m for m in ours if m.summaries[key].q < 0.05]
            parts = []
            for word, sign in (("better", better), ("worse", -better)):
                names = ", ".join(m.name for m in certain if sign * m.summaries[key].difference > 0)
                parts.append(f"{word}: {names or 'none'}")
            return "; ".join(parts)

        cells = [significant("accuracy", 1), significant("early_accuracy", 1), significant("ece", -1)]
        rows.append([name, len(ours), *(mean_and_sd("confidence_gap", gap) for gap in gaps), *cells])
    head = ["recipe", "betas and warm-ups", "gap %, beta 0.1", "cross-entropy", "beta 5"]
    return markdown.table([*head, "accuracy", "early accuracy", "ECE"], rows)


def warmups(found: dict[str, StudyResults]) -> str:
    """Per study: its warm-ups to beta 5 from the smallest start, beside beta 5 from the first update on."""
    keys = ("accuracy", "ece", "confidence_gap", "early_accuracy")
    rows = [
        [name, pair.warmup.name, *(difference(key, pair.summaries[key]) for key in keys)]
        for name, study in found.items()
        for pair in study.pairs()
        if pair.fixed.name == "beta 5" and re.fullmatch("0.01 to 5 over (50|100)%", pair.warmup.name)
    ]
    return markdown.table(["recipe", "warm-up", "accuracy %", "ECE %", "gap %", "early accuracy %"], rows)


def routes() -> str:
    """The same recipe by the Trainer and by timm's train.py: mean, deviation, and the difference by Welch's t-test."""
    found = {
        (route, beta): [read_record(path) for path in sorted(RESULTS.glob(f"both_routes/{route}/beta-{beta}-*.json"))]
        for route in ("trainer", "timm")
        for beta in (1, 5)
    }
    rows, compared = [], []
    for beta in (1, 5):
        values = {
            route: {key: [record["final"][key] for record in found[route, beta]] for key in ("accuracy", "nll", "ece")}
            for route in ("trainer", "timm")
        }
        for route, metrics in values.items():
            cells = [
                mean_and_sd(key, Summary({}, len(v), statistics.mean(v), statistics.stdev(v)))
                for key, v in metrics.items()
            ]
            rows.append([f"beta {beta}, {route}", len(metrics["nll"]), *cells])
        differences = {}
        for key, v in values["trainer"].items():
            test = stats.ttest_ind(v, values["timm"][key], equal_var=False)
            low, high = test.confidence_interval(0.95)
            mean = statistics.mean(v) - statistics.mean(values["timm"][key])
            differences[key] = Summary({}, difference=mean, low=float(low), high=float(high), p=float(test.pvalue))
        compared.append((len(rows), beta, differences))
        rows.append([])
    correct([summary for _, _, differences in compared for summary in differences.values()])
    for place, beta, differences in compared:
        cells = [difference(key, summary) for key, summary in differences.items()]
        rows[place] = [f"beta {beta}, trainer minus timm", "", *cells]
    return markdown.table(["route", "n", "accuracy %", "NLL", "ECE %"], rows)


def diagnosis() -> str:
    """What `gd-plugin diagnose` said of the runs of recipes/digits_traced.yaml."""
    claims = json.loads((RESULTS / "digits_traced/diagnosis.json").read_bytes())["claims"]
    return "\n".join(f"- {name}: {markdown.plain(claim['conclusion'])}" for name, claim in claims.items())


def bench() -> dict[str, str]:
    """What `python -m gd_plugin.bench` measured: a table of the logits' routes, one of a linear head's, the rest."""
    result = json.loads((RESULTS / "bench/bench.json").read_bytes())
    blocks = {}
    for part in ("logits", "smoothing", "linear"):
        cases = [case for case in result["cases"] if case["name"].startswith(part)]
        base = next(iter(cases[0]["routes"]))
        found = [summary_of_times(case["routes"], base) for case in cases]
        rows = []
        for name, route in cases[0]["routes"].items():
            if "absent" in route:
                continue
            cells = []
            for case, ratios in zip(cases, found, strict=True):
                low, median, high = ratios[name]
                mib = peak_in_mib(name, case["routes"][name])
                mib = f", {mib} MiB" if mib else ""
                cells.append(f"{median:.2f} ({low:.2f} to {high:.2f}){mib}")
            rows.append([name, *cells])
        head = [f"time / {base}", *(case["name"].removeprefix(f"{part} ") for case in cases)]
        blocks[f"bench_{part}"] = markdown.table(head, rows)
    steps = "; ".join(
        f"of a {step['model']} of {step['parameters'] / 1e6:.1f} million weights, batch {step['batch']}, "
        f"{median:.3f} ({low:.3f} to {high:.3f})"
        for step in result["step"]
        for low, median, high in [step_ratio(step)]
    )
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers", "timm"))
    blocks["bench_rest"] = (
        "A step of `GradientDecayTrainer` with a warm-up in units of the Trainer's with its own cross-entropy, median "
        f"and quartiles of blocks of steps in turns: {steps}. From 10,000 classes to a million, time grows with their "
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
        "claims": claims(found),
        "warmups": warmups(found),
        "diagnosis": diagnosis(),
        "routes": routes(),
    }
    blocks |= bench()
    for marker in re.findall(r"<!-- (table: \w+|advice|claims|warmups|diagnosis|routes|bench_\w+) -->", text):
        # From the marker to the first empty line.
        pattern = rf"(<!-- {re.escape(marker)} -->\n).*?(?=\n\n)"
        text = re.sub(pattern, lambda match, block=blocks[marker]: match[1] + block, text, flags=re.DOTALL)
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
