"""`gd-plugin card`: every number of a card is in a record, and no text of other people's breaks it."""

import copy
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from gd_plugin.card import run_card
from gd_plugin.record import read_record, write_json

RUNS = {"cross-entropy": {"gd_beta": 1}, "warm-up": {"gd_beta": 5, "gd_beta_start": 0.01, "gd_warmup_ratio": 0.5}}


@pytest.fixture(scope="module")
def trained(train, small, learns, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train("--dataset", "digits", *small, *learns, "--runs", json.dumps(RUNS), output_dir=folder)
    return folder


def test_the_card_of_a_real_run(trained, command):
    code, out, err = command("card", trained / "warm-up")
    path = trained / "warm-up/README.md"
    assert (code, out, err) == (0, f"Model card: {path}\n", "")
    card, record = ModelCard.load(path), read_record(trained / "warm-up/record.json")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "timm",
        "image-classification",
        "apache-2.0",
    )
    assert {"gradient-decay", "timm", "transformers", "arxiv:2210.17145"} <= set(data.tags) and data.datasets is None
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    final = record["final"]
    assert found == {
        "accuracy": final["accuracy"],
        "nll": final["nll"],
        "brier_score": final["brier"],
        "expected_calibration_error": final["ece"],
        "confidence_gap": final["confidence_gap"],
    }
    assert {(r.dataset_name, r.dataset_split) for r in data.eval_results} == {("digits", "test")}
    text = card.text
    baseline = read_record(trained / "cross-entropy/record.json")
    for name, r in (("this model: warm-up", record), ("cross-entropy", baseline)):
        assert f"| {name} | {100 * r['final']['accuracy']:.2f} | {r['final']['nll']:.4f} |" in text
    assert "No cross-entropy baseline" not in text
    assert "beta goes from 0.01 to 5.0 over 0.5 of training (linear), and stays there." in text
    assert (
        record["command"] in text
        and (record["commit"] or "an installed package") in text
        and record["versions"]["torch"] in text
    )
    assert f"is {record['calibrated']['temperature']['temperature']:.4g}:" in text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (path.parent / picture).is_file()
    assert "curves.png" in text and "@article{" in text
    assert record["energy_kwh"] > 0 and f"{record['energy_kwh']:.3g} kWh (codecarbon)" in text
    written = path.read_bytes()
    command("card", trained / "warm-up")
    assert path.read_bytes() == written


def test_the_whole_card(trained, command):
    """Word for word, with every measured number and what depends on the machine as #; tests/card.md is to be read."""
    command("card", trained / "warm-up")
    text = (trained / "warm-up/README.md").read_text()
    text = re.sub(
        r"^\| (commit|versions|python|hardware|wall|energy|date)([^|]*)\|.*", r"| \1\2| # |", text, flags=re.M
    )
    text = re.sub(r"^\| energy.*\n", "", text, flags=re.M)  # where codecarbon is installed
    text = text.replace(str(trained), "runs").replace(trained.name, "runs")
    measured = r"^(      value: |\| this model|\| cross-entropy|The temperature fitted).*"
    text = re.sub(measured, lambda line: re.sub(r"[-+]?\d+\.?\d*(e[-+]\d+)?", "#", line[0]), text, flags=re.M)
    head, settings, tail = re.split(r"(?<=\| setting \| value \|\n\|---\|---\|\n)((?:\|.*\n)+)", text, maxsplit=1)
    text = head + "".join(sorted(settings.splitlines(keepends=True))) + tail  # in the order of the Trainer's arguments
    golden = Path(__file__).parent / "card.md"
    assert text == golden.read_text()


def test_a_run_alone_says_so(trained):
    record = read_record(trained / "warm-up/record.json")
    assert "**No cross-entropy baseline was trained beside it.**" in run_card(record, [], [])
    baseline = read_record(trained / "cross-entropy/record.json")
    assert "No cross-entropy baseline" not in run_card(baseline, [], [])
    # beta is 1 in these too, and they are no cross-entropy
    smoothed = dict(baseline, config=dict(baseline["config"], label_smoothing_factor=0.1))
    warmed = dict(baseline, gd=dict(baseline["gd"], beta_start=0.01, warmup_ratio=0.5))
    for other in (smoothed, warmed, dict(baseline, loss="focal")):
        assert "**No cross-entropy baseline" in run_card(record, [other], [])


HOSTILE = "a|b <script>alert(1)</script> [x](http://e.example) `code` $\\frac$\n---\nlicense: stolen {{ 1 + 1 }}"


def test_hostile_text_stays_text(trained):
    record = copy.deepcopy(read_record(trained / "warm-up/record.json"))
    record["name"] = record["dataset"]["name"] = record["command"] = HOSTILE
    record["model"]["name"] = f"timm:{HOSTILE}"
    record["config"] = {"dataset": HOSTILE, HOSTILE: "1"}
    card = ModelCard(run_card(record, [dict(record, name=HOSTILE)], ["curves.png"]))
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-classification"
    outside_code = re.sub(r"(`+) .*? \1(?!`)|`[^`]*`|^    .*$", "", card.text, flags=re.M)
    assert not re.search(r"(?<!\\)<script", outside_code)
    assert re.findall(r"(?<!\\)\]\((http[^)]*)", outside_code) == ["https://arxiv.org/abs/2210.17145"]
    assert "{{ 1 + 1 }}" in card.text  # not evaluated
    tables = [line for line in card.text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?:\\.|[^|\\])+", line)) for line in tables}
    assert widths == {6, 2}


def structure(card: str) -> list[tuple]:
    """What a viewer makes of it, without the texts: every heading, cell, code span, link and picture, in order."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(card).text)
    inner = [part for token in tokens for part in (token, *(token.children or []))]
    return [(part.type, part.tag, str(part.attrs)) for part in inner if part.type not in ("text", "text_special")]


@pytest.mark.parametrize("hostile", [
    "a|b", "<script>alert(1)</script>", "<!-- ", "![x](http://e.example/x.png)", "[x]: http://e.example", "`", "``x",
    "**x**", "~~x~~", "# x", "\n\n# x\n\n---\n", "| a |\n|---|\n| b |", "http://e.example", "<http://e.example>",
    "- x\n- y", "&lt;b&gt;", "x\\", "\x1b[31m", "x" * 500,
])  # fmt: skip
def test_hostile_text_does_not_change_what_a_card_is_made_of(trained, hostile):
    def card_of(name):
        record = copy.deepcopy(read_record(trained / "warm-up/record.json"))
        record["name"] = record["dataset"]["name"] = record["command"] = record["versions"]["torch"] = name
        record["config"] = {"dataset": name, "learning_rate": name}
        record["hardware"]["cpu"] = record["model"]["name"] = name
        return run_card(record, [dict(record, name=f"other {name}")], ["curves.png"])

    assert structure(card_of(hostile)) == structure(card_of("digits"))


def test_text_that_is_not_escaped_changes_it(trained):
    card = run_card(read_record(trained / "warm-up/record.json"), [], [])
    for hostile in ("<script>alert(1)</script>", "[x](http://e.example)", "**x**"):
        assert structure(card.replace("`digits`", hostile)) != structure(card.replace("`digits`", "x"))


def test_only_a_model_that_was_trained_from_scratch_has_a_license(trained):
    """Of any other, whose weights it began with, the license is not known."""
    record = read_record(trained / "warm-up/record.json")

    def license_and_summary(**changed):
        card = ModelCard(run_card(dict(record, **changed), [], []))
        return card.data.license, card.text.split("## Results")[0]

    license, summary = license_and_summary()
    assert license == "apache-2.0" and ", trained on `digits`" in summary
    for name in ("google/vit-base-patch16-224", "my-folder"):
        license, summary = license_and_summary(model=dict(record["model"], name=name))
        assert license is None and ", fine-tuned on `digits`" in summary
    for key, value in (("pretrained", True), ("initial_checkpoint", "x.pth")):
        assert license_and_summary(config=dict(record["config"], **{key: value}))[0] is None
    said = {"base_model": None, "license": None}
    assert license_and_summary(card=said)[0] is None
    license, summary = license_and_summary(card=dict(said, base_model="google/vit"))
    assert license is None and "fine-tuned from `google/vit` on" in summary
    assert "another loss for comparison with the gradient-decay" in license_and_summary(loss="focal")[1]
    assert "another loss" not in summary


def test_a_run_without_these_metrics_shows_what_it_has(trained):
    record = read_record(trained / "warm-up/record.json")
    card = ModelCard(run_card(dict(record, final={}, calibrated=None), [], []))
    assert "It was not evaluated." in card.text and not card.data.eval_results
    final = {"loss": 1.25, "near_accuracy": 0.5, "far_nll": None}
    card = ModelCard(run_card(dict(record, final=final, calibrated=None), [], []))
    assert "| loss | 1.25 |\n| near\\_accuracy | 0.5 |\n| far\\_nll | - |" in card.text
    assert "No cross-entropy baseline" not in card.text
    assert "of the best checkpoint, that of update 8" in run_card(dict(record, best_step=8), [], [])


@pytest.mark.parametrize("temperature", [2e5, 1e-3])
def test_a_temperature_of_chance_is_called_so(trained, temperature):
    record = copy.deepcopy(read_record(trained / "warm-up/record.json"))
    assert "on request" in run_card(record, [], [])
    record["calibrated"]["temperature"]["temperature"] = temperature
    assert "It is not stored." in run_card(record, [], []) and "on request" not in run_card(record, [], [])


def test_a_diverged_run_has_a_card(trained):
    record = copy.deepcopy(read_record(trained / "warm-up/record.json"))
    record["final"] = dict.fromkeys(record["final"])
    record["calibrated"] = None
    card = ModelCard(run_card(record, [], []))
    assert "| diverged |" in card.text and not card.data.eval_results
    assert "No temperature was fitted." in card.text


def test_runs_on_other_data_are_not_compared(trained, command, tmp_path):
    for name in RUNS:
        record = read_record(trained / name / "record.json")
        if name == "cross-entropy":
            record["dataset"]["train"] += 1
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "record.json", record)
    assert command("card", tmp_path / "warm-up").code == 0
    assert "| cross-entropy |" not in (tmp_path / "warm-up/README.md").read_text()


def test_runs_on_data_without_a_name_are_not_compared(trained, command, tmp_path):
    """Two Trainer scripts side by side, each of which only knows how many samples it had."""
    for name in RUNS:
        record = read_record(trained / name / "record.json")
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "record.json", record | {"dataset": record["dataset"] | {"name": "unknown data"}})
    assert command("card", tmp_path / "warm-up").code == 0
    assert "| cross-entropy |" not in (tmp_path / "warm-up/README.md").read_text()


def test_bad_input(command, trained, tmp_path):
    def error(*words):
        code, out, err = command("card", *words)
        assert (code, out) == (2, "") and err.count("\n") == 1
        return err

    assert f"{tmp_path} holds neither record.json nor study.json; give the folder" in error(tmp_path)
    assert "--method is for a study" in error(trained / "warm-up", "--method", "x")
    (tmp_path / "record.json").write_text("{")
    assert "not JSON" in error(tmp_path)
    assert not (tmp_path / "README.md").exists()
