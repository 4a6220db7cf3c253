"""`gd-plugin push` and the Trainer's push, to a Hub on loopback and back from it in a fresh process."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from files import contents
from hub_server import HubServer, connect
from huggingface_hub import ModelCard
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers import ViTForImageClassification, pipeline

from gd_plugin import apply_temperature
from gd_plugin.cli import main
from gd_plugin.hf import GradientDecayTrainer, GradientDecayTrainingArguments
from gd_plugin.record import read_record, write_json
from gd_plugin.timm import has_loss_factory

ROOT = Path(__file__).parent.parent
PICTURES = {"curves.png", "reliability.png"}
# Loads models in a process of its own, as somebody else would, and writes down their logits.
LOAD = """
import json, sys
import timm, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer
torch.manual_seed(0)
result = {}
for name, kind, size in json.loads(sys.argv[1]):
    if kind == "text":
        inputs = AutoTokenizer.from_pretrained(name)("good film", return_tensors="pt")
        result[name] = AutoModelForSequenceClassification.from_pretrained(name)(**inputs).logits.tolist()
        continue
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    if kind != "timm alone":
        model = AutoModelForImageClassification.from_pretrained(name)
        AutoImageProcessor.from_pretrained(name)
        result[name] = model.eval()(pixels).logits.tolist()
    if "timm" in kind:
        assert timm.create_model("hf_hub:" + name, pretrained=True, num_classes=5)  # for other data
        with torch.no_grad():
            result["timm " + name] = timm.create_model("hf_hub:" + name, pretrained=True).eval()(pixels).tolist()
print(json.dumps(result))
"""  # noqa: E501


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path / "home")
        disable_progress_bars()
        yield server
        enable_progress_bars()


@pytest.fixture(scope="module")
def runs(train, small, learns, vit, bert, tmp_path_factory):
    """A finished run of a timm architecture, of a transformers one and of a language model."""
    folder = tmp_path_factory.mktemp("runs")
    text = tmp_path_factory.mktemp("text")
    for split, count in (("train", 24), ("validation", 16), ("test", 16)):
        words = ["good", "fine", "bad", "poor"]
        rows = [{"text": f"{words[i % 4]} film", "label": "np"[i % 4 < 2]} for i in range(count)]
        (text / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = small[small.index("32") + 1 :]  # without its model
    train("--dataset", "digits", *small, *learns, "--gd_beta", 5, output_dir=folder / "timm")
    train("--dataset", "digits", "--model", vit, *shared, *learns, output_dir=folder / "vit")
    train("--dataset", text, "--model", bert, *shared, output_dir=folder / "bert")
    return folder


@pytest.fixture(scope="module")
def by_timm(tmp_path_factory):
    """A run of timm's train.py, whose folder has no picture and no card yet."""
    from timm_runs import SCRIPTS, SMALL, own_logging, write_digits

    folder = tmp_path_factory.mktemp("by_timm")
    write_digits(folder / "data")
    words = [SCRIPTS.get("new", SCRIPTS["old"]), *SMALL, "--data-dir", folder / "data", "--loss", "gd", "--gd-beta", 5]
    with own_logging():
        assert main(["timm", *map(str, words), "--output", str(folder), "--experiment", "run"]) == 0
    return folder / "run"


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs / "timm", tmp_path / "timm")


def test_what_is_pushed_loads_and_predicts_the_same(hub, runs, by_timm, command, tmp_path):
    folders = {name: shutil.copytree(runs / name, tmp_path / name) for name in ("timm", "vit", "bert")}
    folders["train.py"] = shutil.copytree(by_timm, tmp_path / "train.py")
    for name, folder in folders.items():
        outcome = command("push", folder, "--repo_id", f"tester/{name}")
        assert (outcome.code, outcome.err) == (0, "") and outcome.out == f"{hub.endpoint}/tester/{name}\n"
        repo = hub.repos[f"tester/{name}"]
        assert {"README.md", "config.json", "model.safetensors", "record.json", *PICTURES} <= set(repo.files)
        assert len(repo.commits) == 2  # its creation, and one with everything
        assert repo.files["README.md"] == (folder / "README.md").read_bytes()
        assert repo.files["record.json"] == (folder / "record.json").read_bytes()
        # No pickle, no checkpoint, no path of this machine.
        assert not [file for file in repo.files if re.search(r"\.bin|\.tar|checkpoint|args\.yaml", file)]
        card = ModelCard(repo.files["README.md"].decode())
        record = read_record(folder / "record.json")
        assert {r.metric_type: r.metric_value for r in card.data.eval_results}["nll"] == record["final"]["nll"]

    # transformers builds no ViT of a timm before 1.0.31, whoever trained it.
    train_py = "timm" if has_loss_factory() else "timm alone"
    wanted = [
        ("tester/timm", "timm", 32),
        ("tester/train.py", train_py, 32),
        ("tester/vit", "image", 16),
        ("tester/bert", "text", 0),
    ]
    loaded = load(hub, wanted, tmp_path)
    for name, kind, size in wanted:
        local = logits(folders[name.removeprefix("tester/")], kind, size)
        for key in {name, f"timm {name}"} & loaded.keys():
            torch.testing.assert_close(torch.tensor(loaded[key]), local, rtol=0, atol=1e-6)
    assert {"tester/timm", "timm tester/timm", "timm tester/train.py", "tester/vit", "tester/bert"} <= loaded.keys()
    a, b = (torch.tensor(loaded[f"timm tester/{name}"]) for name in ("timm", "train.py"))
    assert (a - b).abs().max() > 1e-3
    for name in ("timm", "train.py"):
        config = json.loads(hub.repos[f"tester/{name}"].files["config.json"])
        assert "tag" not in config["pretrained_cfg"] and config["pretrained_cfg"]["classifier"]
        assert config["label_names"] == [str(digit) for digit in range(10)]


def load(hub, wanted, tmp_path):
    argv = [sys.executable, "-c", LOAD, json.dumps(wanted)]
    environment = hub.environment(tmp_path / "other") | {"PYTHONPATH": ""}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@torch.no_grad()
def logits(folder, kind, size):
    """Of the trained model as it lies in the folder of the run."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

    if kind == "text":
        inputs = AutoTokenizer.from_pretrained(folder)("good film", return_tensors="pt")
        return AutoModelForSequenceClassification.from_pretrained(folder)(**inputs).logits
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    if (folder / "last.pth.tar").exists():
        import timm

        model = timm.create_model(
            "test_vit", num_classes=10, img_size=32, depth=2, checkpoint_path=str(folder / "last.pth.tar")
        )
        return model.eval()(pixels)
    return AutoModelForImageClassification.from_pretrained(folder).eval()(pixels).logits


def test_a_run_of_timm_that_is_not_finished_is_not_pushed(hub, by_timm, command, tmp_path):
    folder = shutil.copytree(by_timm, tmp_path / "run")
    record = read_record(folder / "record.json")
    for change, message in (
        ({"epochs": []}, f"{folder} stopped after epoch 0 of {record['config']['epochs']}; let it end"),
        ({"config": record["config"] | {"split_bn": True}}, f"{folder} was trained with --split-bn, whose second"),
    ):
        write_json(folder / "record.json", record | change)
        code, _, err = command("push", folder, "--repo_id", "tester/x")
        assert (code, err.count("\n")) == (2, 1) and message in err
    assert not hub.requests


def test_what_timm_was_told_of_the_model_goes_with_it(hub, by_timm, command, tmp_path):
    """--bn-eps changes what the network computes, and --input-size how many channels it has."""
    import timm

    folder = shutil.copytree(by_timm, tmp_path / "run")
    changed = {"model": "test_efficientnet", "model_kwargs": {}, "bn_eps": 0.5, "input_size": [1, 32, 32]}
    record = read_record(folder / "record.json")
    write_json(folder / "record.json", record | {"config": record["config"] | changed})
    options = {"num_classes": record["config"]["num_classes"], "in_chans": 1}
    right = timm.create_model("test_efficientnet", bn_eps=0.5, **options).eval()
    torch.save({"state_dict": right.state_dict()}, folder / "last.pth.tar")
    wrong = timm.create_model("test_efficientnet", checkpoint_path=str(folder / "last.pth.tar"), **options).eval()

    assert command("push", folder, "--repo_id", "tester/grey").code == 0
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name in ("config.json", "model.safetensors"):
        (pushed / name).write_bytes(hub.repos["tester/grey"].files[name])
    loaded = timm.create_model(f"local-dir:{pushed}", pretrained=True).eval()
    pixels = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), right(pixels)) and not torch.equal(loaded(pixels), wrong(pixels))


def test_dry_run_shows_what_goes_and_asks_nobody(hub, run, command, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    outcome = command("push", run, "--repo_id", "tester/digits", "--dry_run")
    assert outcome.code == 0 and "would go to tester/digits, in one commit" in outcome.out and not hub.requests
    shown = set(re.findall(r"│ (\S+) +│ +[\d,]+ │", outcome.out))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert command("push", run, "--repo_id", "tester/digits").code == 0
    assert shown == set(hub.repos["tester/digits"].files) - {".gitattributes"}


def test_private_and_license(hub, run, command):
    assert command("push", run, "--repo_id", "tester/secret", "--private", "--license", "mit").code == 0
    repo = hub.repos["tester/secret"]
    assert repo.private and ModelCard(repo.files["README.md"].decode()).data.license == "mit"
    assert command("push", run, "--repo_id", "tester/open").code == 0
    assert not hub.repos["tester/open"].private


def test_a_card_of_ones_own_is_kept(hub, run, command):
    (run / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert command("push", run, "--repo_id", "tester/digits").code == 0
    assert hub.repos["tester/digits"].files["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"
    code, _, err = command("push", run, "--repo_id", "tester/digits", "--license", "apache-2.0")
    assert (code, err.count("\n")) == (2, 1) and "is not one of gd-plugin's; set the license in it" in err
    assert (run / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"


SAYS = {
    401: "it does not know the token; make one that may write, and give it with `hf auth login` or as HF_TOKEN",
    403: "the token may not write there; make one that may, or choose another --repo_id",
    409: "something else was pushed there at the same time, or is there under the same name; give the command again",
    413: "a file is larger than it takes",
    429: "it is asked too often; wait some minutes and give the command again",
    400: "it does not take the content; check --license and the card",
    500: "nothing is lost; wait, and give the command again",
}


@pytest.mark.parametrize("status", SAYS)
@pytest.mark.parametrize("where", ["/commit/", "/preupload/"])
def test_an_error_of_the_hub_is_one_line_and_loses_nothing(hub, run, command, status, where):
    before = state(run)
    command("push", run, "--repo_id", "tester/digits", "--dry_run")  # which writes the card
    card = state(run)
    assert {key: card[key] for key in before} == before
    hub.fail(where, status)
    code, out, err = command("push", run, "--repo_id", "tester/digits")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"gd-plugin: error: the Hub answers {status} for tester/digits: {SAYS[status]}"), err
    assert hub.token not in err
    assert state(run) == card and len(hub.repos["tester/digits"].commits) == 1  # nothing of it
    hub.heal()
    assert command("push", run, "--repo_id", "tester/digits").code == 0
    assert "model.safetensors" in hub.repos["tester/digits"].files


def test_an_answer_that_cannot_be_read(hub, run, command):
    hub.fail("/validate-yaml", 502, body=b"<html>Bad gateway</html>")
    code, _, err = command("push", run, "--repo_id", "tester/digits")
    assert code == 1 and err == (
        "gd-plugin: error: the Hub's answer cannot be read; nothing is lost, give the command again later\n"
    )
    hub.heal()
    hub.fail("/validate-yaml", 400, body={"errors": [{"message": '"license" must be one of'}], "warnings": []})
    code, _, err = command("push", run, "--repo_id", "tester/digits")
    assert (code, err.count("\n")) == (2, 1) and '"license" must be one of' in err


def test_a_connection_that_ends_in_the_middle_of_an_upload(hub, run, command):
    hub.drop("^/lfs|/lfs/", after_bytes=1000, times=None, method="PUT")
    code, _, err = command("push", run, "--repo_id", "tester/digits")
    assert code == 1 and err.splitlines()[-1].startswith("gd-plugin: error: ")
    assert "the connection to the Hub failed" in err and "give the command again and it goes on" in err
    assert len(hub.repos["tester/digits"].commits) == 1
    hub.heal()
    assert command("push", run, "--repo_id", "tester/digits").code == 0
    assert hub.repos["tester/digits"].files["record.json"] == (run / "record.json").read_bytes()


def test_a_second_push_uploads_no_large_file_again(hub, run, command):
    for failing in ("/commit/", None):
        if failing:
            hub.fail(failing, 500)
        else:
            hub.heal()
            hub.requests.clear()
        command("push", run, "--repo_id", "tester/digits")
    assert "model.safetensors" in hub.repos["tester/digits"].files
    assert not [request for request in hub.requests if request.method == "PUT"]


def test_bad_input(hub, run, command, tmp_path, monkeypatch):
    def error(*words):
        code, out, err = command("push", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        return err

    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.json").write_text("{}")
    assert "is a study, which keeps no models" in error(tmp_path / "study", "--repo_id", "tester/x")
    assert "holds no record.json" in error(tmp_path, "--repo_id", "tester/x")
    assert "--repo_id" in error(run)
    assert "--repo_id a/b/c" in error(run, "--repo_id", "a/b/c")
    assert "--repo_id .." in error(run, "--repo_id", "..")
    (run / "model.safetensors").unlink()
    assert "holds no model" in error(run, "--repo_id", "tester/x")
    assert not hub.requests
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(run)
    words = ["digits", "--push_to_hub", "--num_train_epochs", 1, "--output_dir", run]
    code, _, err = command("train", *words)
    assert (code, err.count("\n")) == (2, 1) and "there is no token for the Hub" in err and not run.exists()
    code, _, err = command("study", "digits", "--push_to_hub", "true", "--output_dir", run)
    assert (code, err.count("\n")) == (2, 1) and "--push_to_hub: a study keeps no models" in err


def test_without_a_token(hub, run, command, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, err = command("push", run, "--repo_id", "tester/digits")
    assert (code, out) == (2, "") and err == (
        "gd-plugin: error: there is no token for the Hub: make one that may write in your settings there, then run "
        "`hf auth login`, or set HF_TOKEN\n"
    )


# In training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_train_pushes_its_own_card(hub, train, small, tmp_path, strategy):
    folder = tmp_path / "digits-5"
    words = ["--push_to_hub", "--hub_strategy", strategy, "--hub_always_push", "true", "--save_strategy", "epoch"]
    words += ["--num_train_epochs", 2, "--gd_beta", 5]
    out = train("--dataset", "digits", *small, *words, output_dir=folder)
    repo = hub.repos["tester/digits-5"]
    assert f"{hub.endpoint}/tester/digits-5" in out
    assert repo.files["README.md"] == (folder / "README.md").read_bytes()
    assert repo.files["record.json"] == (folder / "record.json").read_bytes()
    cards = [commit.files["README.md"].decode() for commit in repo.commits if "README.md" in commit.files]
    assert all("arXiv 2210.17145" in card and "beta is 5.0 throughout" in card for card in cards)
    assert len(cards) == 1  # a record in between would be of a run that is not complete
    assert not [file for file in repo.files if re.search(r"checkpoint|\.bin|args", file)]
    assert_no_token(hub, folder)


def test_a_push_that_fails_keeps_the_models_and_goes_on(hub, command, small, tmp_path):
    folder = tmp_path / "digits-5"
    hub.fail("/commit/", 500)
    words = ["--dataset", "digits", *small, "--push_to_hub", "--hub_strategy", "end", "--output_dir", folder]
    code, _, err = command("train", *words)
    assert code == 1 and "give the command again with --resume" in err
    assert err.endswith("; the trained models are kept\n")
    record = (folder / "record.json").read_bytes()
    hub.heal()
    assert command("train", *words, "--resume").code == 0
    assert hub.repos["tester/digits-5"].files["record.json"] == record


def test_a_run_that_is_interrupted_is_pushed_when_it_is_whole(hub, train, command, small, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    from gd_plugin import fit

    folder = tmp_path / "digits-5"
    words = ["--dataset", "digits", *small, "--push_to_hub", "--save_strategy", "epoch", "--num_train_epochs", 2]

    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    with monkeypatch.context() as patched:
        patched.setattr(fit, "_SaveAfterEvaluation", Stop)
        assert command("train", *words, "--output_dir", folder).code == 130
    assert set(hub.repos["tester/digits-5"].files) <= {".gitattributes", ".gitignore"}
    train(*words, "--resume", output_dir=folder)
    repo = hub.repos["tester/digits-5"]
    assert repo.files["record.json"] == (folder / "record.json").read_bytes()
    assert {"README.md", "model.safetensors", *PICTURES} <= set(repo.files)


def test_the_trainers_own_card(hub, tmp_path, vit):
    """A Trainer script of a user's own: every push has the card, the record and the pictures."""
    model = ViTForImageClassification.from_pretrained(vit)
    samples = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(16)]
    args = GradientDecayTrainingArguments(
        str(tmp_path / "mine"), gd_beta=5.0, gd_beta_start=0.01, gd_warmup_ratio=0.5, push_to_hub=True,
        hub_strategy="every_save", hub_always_push=True, save_strategy="epoch", eval_strategy="epoch", logging_steps=1,
        num_train_epochs=2, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = GradientDecayTrainer(model=model, args=args, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    trainer.push_to_hub(dataset="my images", dataset_tags="me/images", license="mit", tags=["mine"], language="en")
    repo = hub.repos["tester/mine"]
    assert {"README.md", "record.json", "model.safetensors", *PICTURES} <= set(repo.files)
    card = ModelCard(repo.files["README.md"].decode())
    assert (card.data.license, card.data.datasets, card.data.language) == ("mit", ["me/images"], "en")
    assert {"mine", "gradient-decay", "generated_from_trainer"} <= set(card.data.tags)
    assert (card.data.pipeline_tag, card.data.model_name) == ("image-classification", "mine")
    evaluation = next(entry for entry in reversed(trainer.state.log_history) if "eval_nll" in entry)
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["nll"] == evaluation["eval_nll"] and found["expected_calibration_error"] == evaluation["eval_ece"]
    assert (
        "beta goes from 0.01 to 5.0 over 0.5 of training (linear)" in card.text
        and "`my images` (16 samples)" in card.text
    )
    record = read_record(tmp_path / "mine/record.json")
    assert record["gd"]["beta"] == 5 and record["epochs"][-1]["eval_ece"] == evaluation["eval_ece"]
    cards = [commit.files["README.md"].decode() for commit in repo.commits if "README.md" in commit.files]
    assert len(cards) >= 3 and all("beta goes from 0.01 to 5.0" in card for card in cards)


def trainer_of(model, folder, trainer_class=GradientDecayTrainer, eval_dataset=None, **arguments):
    from datasets import Dataset

    samples = [{"pixel_values": torch.randn(3, 16, 16).tolist(), "labels": i % 3} for i in range(16)]
    data = Dataset.from_list(samples).with_format("torch")
    args = GradientDecayTrainingArguments(
        str(folder), gd_beta=5.0, num_train_epochs=2, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
        **arguments,
    )  # fmt: skip
    return trainer_class(model=model, args=args, train_dataset=data, eval_dataset=eval_dataset or data)


def test_a_token_among_the_arguments_stays_at_home(hub, tmp_path, vit, monkeypatch):
    """The Trainer pickles its arguments beside the weights and pushes them."""
    monkeypatch.delenv("HF_TOKEN")
    model = ViTForImageClassification.from_pretrained(vit)
    trainer = trainer_of(model, tmp_path / "mine", push_to_hub=True, hub_token=hub.token, save_strategy="epoch")
    trainer.train()
    trainer.push_to_hub()
    assert trainer.args.hub_token == hub.token and "training_args.bin" in hub.repos["tester/mine"].files
    with zipfile.ZipFile(tmp_path / "mine/training_args.bin") as pickled:
        assert b"hub_token" in pickled.read(next(n for n in pickled.namelist() if n.endswith("data.pkl")))
    assert_no_token(hub, tmp_path / "mine")
    torch.save(trainer.args, tmp_path / "mine/control.bin")
    with pytest.raises(AssertionError):
        assert_no_token(hub, tmp_path / "mine")


def test_a_card_of_several_evaluations_and_of_the_best_checkpoint(tmp_path, vit):
    trainer = trainer_of(
        ViTForImageClassification.from_pretrained(vit), tmp_path / "sets", eval_strategy="epoch", learning_rate=0.0
    )
    trainer.eval_dataset = {"near": trainer.train_dataset, "far": trainer.train_dataset}
    trainer.train()
    trainer.create_model_card()
    record = read_record(tmp_path / "sets/record.json")
    assert {"near_nll", "far_nll"} <= record["final"].keys()
    text = (tmp_path / "sets/README.md").read_text()
    assert f"| near\\_nll | {record['final']['near_nll']:.6g} |" in text
    assert 0 < record["wall_time_s"] == pytest.approx(trainer.state.log_history[-1]["train_runtime"], abs=0.1)

    trainer = trainer_of(
        ViTForImageClassification.from_pretrained(vit), tmp_path / "best", eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="nll", greater_is_better=True, learning_rate=1.0,
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card()
    record = read_record(tmp_path / "best/record.json")
    logged = [entry["eval_nll"] for entry in trainer.state.log_history if "eval_nll" in entry]
    assert record["final"]["nll"] == logged[0] > logged[1]
    assert f"of the best checkpoint, that of update {record['best_step']}" in (tmp_path / "best/README.md").read_text()

    trainer = trainer_of(ViTForImageClassification.from_pretrained(vit), tmp_path / "none", max_steps=1)
    trainer.train()
    trainer.create_model_card()
    assert "It was not evaluated." in (tmp_path / "none/README.md").read_text()


def test_the_names_of_runs_of_several_say_of_what(hub, command, small, tmp_path):
    runs = json.dumps({"a": {"gd_beta": 1}, "b": {"gd_beta": 5}})
    words = ["--dataset", "digits", *small, "--push_to_hub", "--runs", runs, "--output_dir", tmp_path / "digits"]
    assert command("train", *words).code == 0
    assert {"tester/digits-a", "tester/digits-b"} == set(hub.repos)


def test_a_token_that_may_not_write_is_noticed_before_training(hub, command, small, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    folder = tmp_path / "digits"
    words = ["--dataset", "digits", *small, "--push_to_hub", "--output_dir", folder]
    code, _, err = command("train", *words)
    assert (code, err.count("\n")) == (1, 1) and err.startswith("gd-plugin: error: the Hub answers 401 for digits")
    assert "trained models" not in err and not folder.exists()


def assert_no_token(hub, folder):
    everything = [*contents(folder), *(content for repo in hub.repos.values() for content in repo.files.values())]
    assert len(everything) > 5 and not any(hub.token.encode() in content for content in everything)


def state(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Probabilities --------------------------------------------------------------------------------------------------------


def test_pipelines_give_the_plain_softmax_and_the_temperature_on_request(runs):
    from PIL import Image

    for name, task, given in (
        ("timm", "image-classification", Image.new("L", (8, 8), 100)),
        ("vit", "image-classification", Image.new("L", (8, 8), 100)),
        ("bert", "text-classification", "good film"),
    ):
        record = read_record(runs / name / "record.json")
        pipe = pipeline(task, model=str(runs / name))
        temperature = pipe.model.config.gd_temperature
        assert temperature == record["calibrated"]["temperature"]["temperature"] != 1, name
        (raw,) = pipe.model(**pipe.preprocess(given)).logits.tolist()
        classes = [pipe.model.config.id2label[i] for i in range(len(raw))]

        def expected(t, raw=raw, classes=classes):
            return dict(zip(classes, torch.tensor(raw).div(t).softmax(0).tolist(), strict=True))

        def given_by(pipe, given=given, classes=classes):
            return {entry["label"]: entry["score"] for entry in pipe(given, top_k=len(classes))}

        assert given_by(pipe) == pytest.approx(expected(1), abs=1e-6)
        apply_temperature(pipe.model)
        assert apply_temperature(pipe.model) is pipe.model  # once is enough
        assert given_by(pipe) == pytest.approx(expected(temperature), abs=1e-6)
        assert given_by(pipe) != pytest.approx(expected(1), abs=1e-3)


def test_a_model_in_training_keeps_its_logits(runs):
    model = ViTForImageClassification.from_pretrained(runs / "vit").train()
    pixels = torch.rand(1, 3, 16, 16)
    before = model(pixels).logits
    assert torch.equal(apply_temperature(model)(pixels).logits, before)
    assert not torch.equal(model.eval()(pixels).logits, before)


def test_a_timm_model_that_is_fine_tuned_forgets_what_it_was(runs, tmp_path):
    """Its classes, and where its weights were from; the temperature goes with the first update."""
    from gd_plugin.arguments import ModelArguments
    from gd_plugin.models import build_model

    folder = shutil.copytree(runs / "timm", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"tag": "a1_in1k", "label_names": config["label_names"]}
    (folder / "config.json").write_text(json.dumps(config))
    pets = SimpleNamespace(kind="image", name="pets", label_names=["cat", "dog"])
    model, _ = build_model(ModelArguments(model=str(folder)), pets)
    model.save_pretrained(tmp_path / "tuned")
    saved = json.loads((tmp_path / "tuned/config.json").read_text())
    assert saved["label_names"] == ["cat", "dog"] and saved["num_classes"] == 2
    assert not {"tag", "label_names"} & saved["pretrained_cfg"].keys()


def test_further_training_forgets_the_temperature(runs, tmp_path):
    model = ViTForImageClassification.from_pretrained(runs / "vit")
    assert model.config.gd_temperature
    samples = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 10} for i in range(8)]
    args = GradientDecayTrainingArguments(
        str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    trainer = GradientDecayTrainer(model=model, args=args, train_dataset=samples)
    trainer.train()
    trainer.save_model()
    assert "gd_temperature" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("temperature", [None, 0, -1, float("nan"), float("inf"), "2"])
def test_a_temperature_that_is_none(runs, temperature):
    model = ViTForImageClassification.from_pretrained(runs / "vit")
    model.config.gd_temperature = temperature
    with pytest.raises(ValueError, match="the model's configuration has no temperature"):
        apply_temperature(model)
