"""`gd-plugin train` from the words of the command line to the files, which are read back by those who will use them."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from gd_plugin.arguments import DataArguments
from gd_plugin.data import PreparedImages, load_data
from gd_plugin.hf import GradientDecayTrainingArguments
from gd_plugin.metrics import METRICS, classification_metrics
from gd_plugin.record import read_record

RUNS = {  # of the recipe `digits`: name -> (folder, what its loss is)
    "cross-entropy": ("cross-entropy", {"beta": 1.0}),
    "beta 0.1": ("beta-0.1", {"beta": 0.1}),
    "beta 5": ("beta-5", {"beta": 5.0}),
    "beta 0.01 to 5": ("beta-0.01-to-5", {"beta": 5.0, "beta_start": 0.01, "warmup_ratio": 0.5}),
}
FOLDERS = [folder for folder, _ in RUNS.values()]
TOKEN = "hf_SENTINEL"
CPU = ("--use_cpu", "true")


def png_size(path):
    image = PILImage.open(path)
    image.load()
    assert image.format == "PNG"
    assert len(image.convert("L").getcolors()) > 10  # something is drawn
    return image.size


def final(folder):
    return read_record(folder / "record.json")["final"]


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# The recipe -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(train, small, tmp_path_factory):
    """The recipe as it is but for its size: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("recipe") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", f"{TOKEN}_1")
        out = train("digits", *small, "--num_train_epochs", 2, "--hub_token", f"{TOKEN}_2", output_dir=folder)
    return folder, out


def test_the_table_names_every_run(recipe):
    folder, out = recipe
    assert "digits: 128 training, 64 validation, 64 test samples (tested on: test), 10 classes" in out
    for name, (subfolder, _) in RUNS.items():
        (row,) = (line for line in out.split("\n") if line.startswith(f"│ {name} "))
        metrics = final(folder / subfolder)
        assert [cell.strip() for cell in row.split("│")[2:4]] == [
            f"{100 * metrics['accuracy']:.2f}",
            f"{metrics['nll']:.4f}",
        ]
    assert str(folder) in out.replace("\n", "")


def test_the_pictures_show_the_runs_side_by_side(recipe):
    folder, _ = recipe
    sizes = {}
    for name in ("curves.png", "reliability.png"):
        sizes[name] = png_size(folder / name)
        for subfolder in FOLDERS:
            width, height = png_size(folder / subfolder / name)
            assert 400 < width < 4000 and 300 < height < 3000
    # One panel for each of four runs is wider than for one.
    assert sizes["reliability.png"][0] > 2 * png_size(folder / "beta-5" / "reliability.png")[0]
    assert (folder / "curves.png").read_bytes() != (folder / "beta-5" / "curves.png").read_bytes()


@pytest.mark.parametrize("name", RUNS)
def test_the_record(recipe, name):
    subfolder, loss = RUNS[name]
    path = recipe[0] / subfolder / "record.json"
    record = read_record(path)
    assert record["name"] == name
    assert record["gd"] == {
        **{"beta_start": None, "schedule": "linear", "warmup_ratio": 0.0, "warmup_steps": 0, "warmup_epochs": 0.0},
        "class_weights": None,
        **loss,
    }
    assert (record["config"]["dataset"], record["config"].get("gd_beta", [1.0]), record["seed"]) == (
        "digits",
        [loss["beta"]],
        0,
    )
    assert record["config"]["num_train_epochs"] == 2  # flags go before the recipe
    assert record["versions"]["transformers"] == transformers.__version__
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+dirty)?", record["commit"])
    assert record["hardware"]["cpu_count"] == os.cpu_count()
    assert record["dataset"]["labels"] == [str(i) for i in range(10)]
    assert record["model"]["parameters"] > 100_000
    assert [(epoch["epoch"], epoch["step"]) for epoch in record["epochs"]] == [(1, 4), (2, 8)]
    for metrics in (*record["epochs"], *record["log"]):
        assert metrics["gd_beta"] > 0 and math.isfinite(metrics["cross_entropy"])
    assert [entry["step"] for entry in record["log"]] == list(range(1, 9))
    assert record["log"][0]["gd_beta"] == pytest.approx(loss.get("beta_start", loss["beta"]))
    assert {f"eval_{metric}" for metric in METRICS} <= record["epochs"][0].keys()
    assert {*METRICS, "loss"} == record["final"].keys()
    assert sum(b["count"] for b in record["reliability"]) == record["dataset"]["test"] == 64


def test_nothing_private_is_written(recipe):
    folder, out = recipe
    everything = files(folder)
    assert len(everything) > 4 * 10
    for path, content in everything.items():
        assert TOKEN.encode() not in content, path
    assert TOKEN not in out
    for subfolder in FOLDERS:
        text = (folder / subfolder / "record.json").read_text()
        for private in (str(folder), str(folder.parent), str(Path.home()) + "/", socket.gethostname(), os.getcwd()):
            assert private not in text
        assert json.loads(text)["command"].endswith(
            f"--num_train_epochs 2 --hub_token '***' --output_dir {folder.name}"
        )


@pytest.mark.parametrize("subfolder", FOLDERS)
def test_the_model_loads_plainly_and_has_the_metrics_of_the_record(recipe, subfolder):
    folder = recipe[0] / subfolder
    model, processor = (c.from_pretrained(folder) for c in (AutoModelForImageClassification, AutoImageProcessor))
    assert not model.training

    def metrics(split):
        images = PreparedImages(split, processor)
        with torch.no_grad():
            return classification_metrics(model(torch.stack([x["pixel_values"] for x in images])).logits, split.labels)

    data = load_data(DataArguments(dataset="digits", max_train_samples=128, max_eval_samples=64))
    recorded = read_record(folder / "record.json")
    computed = metrics(data.test)
    assert {key: recorded["final"][key] for key in computed} == pytest.approx(computed, rel=1e-4, abs=1e-6)
    # The validation split is other data with other numbers, which stand for the last epoch.
    validation = metrics(data.validation)
    assert validation != pytest.approx(computed, rel=1e-4, abs=1e-6)
    last = {key: recorded["epochs"][-1][f"eval_{key}"] for key in validation}
    assert last == pytest.approx(validation, rel=1e-4, abs=1e-6)


def test_the_models_of_the_runs_differ(recipe):
    weights = [
        next(
            v for k, v in load_file(recipe[0] / folder / "model.safetensors").items() if k.endswith("classifier.weight")
        )
        for folder in FOLDERS
    ]
    for i, a in enumerate(weights):
        assert not any(torch.equal(a, b) for b in weights[:i])


def test_the_pipeline_takes_a_grey_digit(recipe):
    classify = transformers.pipeline("image-classification", str(recipe[0] / "beta-5"), device="cpu")
    digit = load_data(DataArguments(dataset="digits")).test.inputs[0]["input"]
    assert (digit.mode, digit.size) == ("L", (8, 8))
    answers = classify(digit, top_k=10)
    assert {answer["label"] for answer in answers} == {str(i) for i in range(10)}
    assert sum(answer["score"] for answer in answers) == pytest.approx(1, abs=1e-5)


def test_args_yaml_is_a_recipe_that_repeats_the_run(recipe, train, tmp_path):
    folder, settings = recipe[0] / "beta-0.01-to-5", recipe[0] / "beta-0.01-to-5" / "args.yaml"
    assert yaml.safe_load(settings.read_text())["gd_beta_start"] == [0.01]
    train(settings, output_dir=tmp_path / "same")
    train(settings, "--seed", "1", output_dir=tmp_path / "other")
    assert final(tmp_path / "same") == final(folder)
    assert final(tmp_path / "other") != final(folder)
    assert (tmp_path / "same" / "args.yaml").read_text() == settings.read_text()
    assert read_record(tmp_path / "same" / "record.json")["name"] == "beta 0.01 to 5"  # named after its loss


def test_a_recipe_by_its_path_and_the_default_folder(command, small, tmp_path, monkeypatch):
    path = Path(__file__).parent.parent / "recipes" / "digits.yaml"
    monkeypatch.chdir(tmp_path)
    one = '{"one": {"gd_beta": 2}}'
    outcome = command("train", path, *small, "--max_train_samples", 32, "--runs", one)
    assert (outcome.code, outcome.err) == (0, "")
    assert read_record(Path("runs/digits/one/record.json"))["gd"]["beta"] == 2
    assert os.listdir() == ["runs"]
    assert str(path.parent) not in Path("runs/digits/one/record.json").read_text()


# Text and images of other kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "labels"), [("csv", ["bad", "good"]), ("jsonl", [0, 1])])
def test_text(train, bert, tmp_path, labels, form):
    words = [["poor", "awful"], ["great", "good"]]
    for split, n in (("train", 64), ("test", 16)):
        rows = [(f"{words[i % 2][i // 2 % 2]} film {i}", labels[i % 2]) for i in range(n)]
        if form == "csv":
            text = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
        else:
            text = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        (tmp_path / f"{split}.{form}").write_text(text)
    sizes = ["--num_train_epochs", 8, "--learning_rate", 0.01, "--per_device_train_batch_size", 8]
    train("--dataset", tmp_path, "--model", bert, *sizes, "--gd_beta", 2, *CPU, output_dir=tmp_path / "out")

    record = read_record(tmp_path / "out" / "record.json")
    names = [str(label) for label in labels]
    assert record["dataset"]["labels"] == names
    assert record["final"]["accuracy"] == 1  # one word tells the class
    assert (record["config"]["model"], record["model"]["name"]) == (bert.name, bert.name)
    assert str(tmp_path) not in (tmp_path / "out" / "record.json").read_text()

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert list(model.config.id2label.values()) == names
    with torch.no_grad():
        logits = model(**tokenizer(["awful film", "great film"], padding=True, return_tensors="pt")).logits
    assert logits.argmax(-1).tolist() == [0, 1]
    answers = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu")(
        ["awful song", "good " * 100], top_k=None, truncation=True
    )
    assert [answer[0]["label"] for answer in answers] == names
    assert sum(answer["score"] for answer in answers[0]) == pytest.approx(1, abs=1e-5)


def test_a_language_model_without_padding(train, bert, tmp_path):
    """GPT-2 has no padding token, and refuses a batch of more than one text until it is told of one."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    vocabulary = len(tokenizer)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(vocab_size=vocabulary, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=3)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    assert AutoTokenizer.from_pretrained(tmp_path / "gpt2").pad_token is None
    (tmp_path / "texts").mkdir()
    rows = "".join(f"{'good film ' * (i % 20)}bad,{i % 2}\n" for i in range(40))  # of 1 to 39 words
    (tmp_path / "texts" / "train.csv").write_text("text,label\n" + rows)
    train("--dataset", tmp_path / "texts", "--model", tmp_path / "gpt2", *CPU, output_dir=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "[SEP]"
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu", batch_size=2)
    assert len(classify(["good film", "bad"])) == 2


def test_a_local_model_with_other_classes(train, vit, tmp_path):
    assert AutoModelForImageClassification.from_pretrained(vit).config.num_labels == 3
    rng = np.random.default_rng(0)
    for label, level in (("dark", 40), ("bright", 200)):
        (tmp_path / "lamps" / "train" / label).mkdir(parents=True)
        for i in range(20):
            pixels = (level + rng.integers(-20, 20, (9, 7, 3))).astype(np.uint8)
            mode = ("RGB", "L", "RGBA", "P")[i % 4]
            PILImage.fromarray(pixels).convert(mode).save(tmp_path / "lamps" / "train" / label / f"{i}.png")
    sizes = ["--num_train_epochs", 5, "--learning_rate", 0.01, "--per_device_train_batch_size", 8]
    out = train("--dataset", tmp_path / "lamps", "--model", vit, *sizes, *CPU, output_dir=tmp_path / "out")
    assert "lamps, split: 0.1 of train" in out
    record = read_record(tmp_path / "out" / "record.json")
    assert record["dataset"] == {
        **{"name": "lamps", "kind": "image", "train": 36, "validation": 4, "test": 4, "tested_on": "0.1 of train"},
        "labels": ["bright", "dark"],
    }
    classify = transformers.pipeline("image-classification", str(tmp_path / "out"), device="cpu")
    for label, level in (("dark", 40), ("bright", 200)):
        answers = classify(PILImage.new("RGB", (8, 8), (level,) * 3))
        assert len(answers) == 2 and answers[0]["label"] == label


def test_a_diverged_run_is_reported_as_such(train, small, tmp_path):
    flags = ["--dataset", "digits", *small, "--learning_rate", "1e30"]
    for more in ([], ["--resume"]):  # the second time from the record, in which NaN is null
        out = train(*flags, *more, output_dir=tmp_path)
        assert len(re.findall("│ +diverged +(?=│)", out)) == 5
    assert read_record(tmp_path / "record.json")["final"]["nll"] is None


def test_a_run_that_logs_nothing_keeps_its_record(train, small, tmp_path):
    silent = ["--eval_strategy", "no", "--logging_strategy", "no"]
    out = train("--dataset", "digits", *small, *silent, output_dir=tmp_path)
    assert "curves.png: nothing to draw" in out
    assert not (tmp_path / "curves.png").exists() and png_size(tmp_path / "reliability.png")
    assert 0 < read_record(tmp_path / "record.json")["final"]["nll"] < 100


HOSTILE = ["[red]x[/red] [/]", "$x_1$ %s {0}", "<script>two\nlines</script>", "../../x\\", "a" * 300]


def test_hostile_names(train, small, tmp_path):
    pictures = [PILImage.new("RGB", (8, 8), (i, 0, 0)) for i in range(8 * len(HOSTILE))]
    labels = [i % len(HOSTILE) for i in range(len(pictures))]
    features = Features({"image": Image(), "label": ClassLabel(names=HOSTILE)})
    folder = tmp_path / "<b>$x_1$"  # datasets finds no folder with brackets in its name
    folder.mkdir()
    Dataset.from_dict({"image": pictures, "label": labels}, features).to_parquet(folder / "train.parquet")
    runs = json.dumps({name: {"gd_beta": 1 + i} for i, name in enumerate(HOSTILE)})
    out = train(
        "--dataset", folder, *small, "--max_train_samples", 32, "--runs", runs, output_dir=tmp_path / "a" / "b" / "out"
    )

    for name in HOSTILE:
        assert all(line in out for line in name[:20].split("\n"))
    assert f"{folder.name}, split" in out
    # Every name became one folder inside the output folder, and nothing was written elsewhere.
    inside = tmp_path / "a" / "b" / "out"
    records = [read_record(path) for path in inside.glob("*/record.json")]
    assert sorted(record["name"] for record in records) == sorted(HOSTILE)
    assert len(list(tmp_path.rglob("record.json"))) == len(HOSTILE)
    assert records[0]["dataset"]["labels"] == HOSTILE
    assert png_size(inside / "curves.png") and png_size(inside / "reliability.png")
    assert (
        list(AutoModelForImageClassification.from_pretrained(inside / "red-x-red").config.id2label.values()) == HOSTILE
    )


def test_processes_that_the_trainer_does_not_see(tmp_path):
    """Each of them would train alone, into the same folder."""
    done = subprocess.run(
        [sys.executable, "-m", "gd_plugin", "train", "digits", "--output_dir", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ
        | {"WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert done.stderr == (
        "gd-plugin: error: 2 processes were started, and the Trainer sees 1; on the CPU add --use_cpu true, elsewhere "
        "start them with torchrun or accelerate launch\n"
    )


def test_batches_that_do_not_come_out_even_over_processes(command, small, tmp_path, monkeypatch):
    monkeypatch.setattr(GradientDecayTrainingArguments, "world_size", property(lambda self: 2))
    words = [*small, "--max_train_samples", "70", "--accelerator_config", '{"even_batches": false}']
    code, _, err = command("train", "--dataset", "digits", *words, "--output_dir", tmp_path / "out")
    assert code == 2 and "even_batches false: the 3 batches of an epoch do not come out even over 2 processes" in err
    assert not (tmp_path / "out").exists()


# The output folder ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _finished(train, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    train("--dataset", "digits", *small, output_dir=folder)
    return folder


@pytest.fixture
def finished(_finished, tmp_path):
    """A complete run, with files of the user's in its folder."""
    folder = shutil.copytree(_finished, tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    (folder / "best").mkdir()
    (folder / "best" / "weights").write_text("mine")
    (folder / "checkpoint-7.zip").write_text("mine")
    return folder


USERS = {Path("notes.txt"), Path("best/weights"), Path("checkpoint-7.zip")}


def test_a_folder_that_holds_a_run_is_refused(command, small, finished):
    before = files(finished)
    code, _, err = command("train", "--dataset", "digits", *small, "--output_dir", finished)
    assert code == 2 and "already holds a run; go on with it with --resume, replace it with --overwrite" in err
    assert files(finished) == before
    # Neither do files of the user's make a run.
    for path in before.keys() - USERS:
        (finished / path).unlink()
    shutil.rmtree(finished / "checkpoint-4")
    assert command("train", "--dataset", "digits", *small, "--output_dir", finished).code == 0


def test_overwrite_replaces_the_run_and_nothing_else(train, small, finished):
    before = files(finished)
    train("--dataset", "digits", *small, "--overwrite", "--max_train_samples", 64, output_dir=finished)
    after = files(finished)
    assert {path: after[path] for path in USERS} == {path: before[path] for path in USERS}
    assert {path for path in after if "checkpoint-4" in path.parts} == set()  # 64 samples are 2 updates
    assert (finished / "checkpoint-2").is_dir()
    for path in map(Path, ("record.json", "model.safetensors", "args.yaml", "curves.png", "reliability.png")):
        assert after[path] != before[path]


def test_a_folder_that_the_trainer_would_take_for_a_checkpoint(command, small, tmp_path):
    """It removes every folder `checkpoint-*` but the newest."""
    (tmp_path / "checkpoint-best").mkdir()
    code, _, err = command("train", "--dataset", "digits", *small, "--output_dir", tmp_path)
    assert code == 2 and f"{tmp_path / 'checkpoint-best'} is no checkpoint of the Trainer" in err
    assert os.listdir(tmp_path) == ["checkpoint-best"]


def test_overwrite_removes_nothing_before_all_is_checked(command, small, finished):
    before = files(finished)
    for bad in (["--model", "timm:nothing"], ["--gd_warmup_steps", "999", "--gd_beta_start", "0.1"]):
        assert command("train", "--dataset", "digits", *small, *bad, "--overwrite", "--output_dir", finished).code == 2
        assert files(finished) == before


def test_resume_leaves_complete_runs_as_they_are(train, small, tmp_path):
    runs = ["--runs", '{"one": {"gd_beta": 1}, "two": {"gd_beta": 2}}']
    train("--dataset", "digits", *small, *runs, output_dir=tmp_path)
    before = files(tmp_path)
    shutil.rmtree(tmp_path / "two")
    # A resume may come from another folder with other words, as long as the settings are the same.
    out = train("--dataset=digits", *small, *runs, "--resume", "true", output_dir=tmp_path)
    after = files(tmp_path)
    assert "one: already complete" in out and "two: already complete" not in out
    assert {p: c for p, c in after.items() if p.parts[0] == "one"} == {
        p: c for p, c in before.items() if p.parts[0] == "one"
    }
    assert final(tmp_path / "two") == json.loads(before[Path("two/record.json")])["final"]
    assert before[Path("two/record.json")] != after[Path("two/record.json")]  # it was trained again
    assert re.search("│ one +│.*│ two +│", out, re.DOTALL)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gd_beta", "3"], "holds a run with gd_beta None, not [3.0]; resume it with the same settings"),
        (["--seed", "5"], "holds a run with seed 0, not 5;"),
        (["--max_train_samples", "64"], "holds a run with max_train_samples 128, not 64;"),
    ],
)
def test_resume_with_other_settings_is_refused(command, small, finished, flags, message):
    before = files(finished)
    code, _, err = command("train", "--dataset", "digits", *small, *flags, "--resume", "--output_dir", finished)
    assert code == 2 and message in err
    assert files(finished) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("record.json", '{"format": 1}', "record.json: the record lacks name, config"),
        ("record.json", "{", "record.json: not JSON"),
        ("args.yaml", "a: [", "args.yaml is missing or damaged"),
        ("args.yaml", "just text", "args.yaml is missing or damaged"),
        ("args.yaml", None, "args.yaml is missing or damaged"),
    ],
)
def test_resume_of_damaged_files(command, small, finished, name, content, message):
    (finished / name).unlink()
    if content is not None:
        (finished / name).write_text(content)
    code, _, err = command("train", "--dataset", "digits", *small, "--resume", "--output_dir", finished)
    assert code == 2 and message in err and err.count("\n") == 1


# Ctrl-C and worse -----------------------------------------------------------------------------------------------------

# 32 short updates an epoch, 64 in all, and the warm-up ends after 60; dropout makes the random state matter.
WARM_UP = [
    *("--dataset", "digits", "--gd_beta", "5", "--gd_beta_start", "0.01", "--gd_warmup_steps", "60"),
    *("--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--logging_steps", "8"),
    *("--model_args", '{"drop_rate": 0.3}'),
]


@pytest.fixture(scope="module")
def uninterrupted(train, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    train(*small, *WARM_UP, output_dir=folder)
    return folder


def wait_for(path, process):
    end = time.monotonic() + 120
    while not path.exists():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_to_the_same_weights(start, train, small, uninterrupted, tmp_path, kill):
    folder = tmp_path / "out"
    process = start(["train", *small, *WARM_UP, "--output_dir", folder], tmp_path / "err")
    wait_for(folder / "checkpoint-32" / "trainer_state.json", process)
    os.killpg(process.pid, kill)
    process.join(60)
    assert not (folder / "record.json").exists()
    if kill == signal.SIGINT:
        assert process.exitcode == 130
        said = (tmp_path / "err").read_text()  # older versions of transformers warn here too
        stopped = int(re.search(r"^gd-plugin: stopped after update (\d+) of 64, .* --resume$", said, re.MULTILINE)[1])
        assert 32 < stopped < 60  # in the second epoch, and in the warm-up
        assert (folder / f"checkpoint-{stopped}" / "optimizer.pt").exists()
    else:
        assert process.exitcode == -signal.SIGKILL
        # As if it had been killed a little later, while it wrote the next checkpoint.
        (folder / "checkpoint-40").mkdir()
        shutil.copy(folder / "checkpoint-32" / "model.safetensors", folder / "checkpoint-40")

    train(*small, *WARM_UP, "--resume", output_dir=folder)
    expected, weights = (load_file(path / "model.safetensors") for path in (uninterrupted, folder))
    assert expected.keys() == weights.keys() and len(weights) > 20
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    assert final(folder) == final(uninterrupted)
    # The curves have no point more or less, and beta went on where it was.
    epochs, log = (
        [[(e["step"], e[key]) for e in read_record(path / "record.json")[part]] for path in (folder, uninterrupted)]
        for part, key in (("epochs", "eval_nll"), ("log", "gd_beta"))
    )
    assert epochs[0] == epochs[1] and [step for step, _ in epochs[0]] == [32, 64]
    assert log[0] == log[1] and log[0][5][1] == pytest.approx(0.01 + 4.99 * 47 / 60)


def test_another_warm_up_gives_other_weights(train, small, uninterrupted, tmp_path):
    """Or the comparison above would show nothing."""
    train(*small, *WARM_UP, "--gd_warmup_steps", "50", output_dir=tmp_path)
    a, b = (load_file(path / "model.safetensors") for path in (uninterrupted, tmp_path))
    assert not all(torch.equal(a[name], b[name]) for name in a)
