"""The console script: help, and one line for everything that is wrong with what it is asked to do."""

import json
import re

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

import gd_plugin
from gd_plugin.cli import main

TEXT = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
TWO_LABELS = Features({"img": Image(), "fine": ClassLabel(names=["a", "b"]), "coarse": ClassLabel(names=["c", "d"])})
ROWS = "".join(f"film {i},{'neg' if i % 2 else 'pos'}\n" for i in range(10))


@pytest.fixture(scope="session")
def things(tmp_path_factory, bert, vit):
    """Folder of data sets, models and recipes that are wrong in one way each, but for `good`."""
    root = tmp_path_factory.mktemp("things")

    def csv(name, **splits):
        (root / name).mkdir()
        for split, text in splits.items():
            (root / name / f"{split}.csv").write_text(text)

    def parquet(name, features, **splits):
        (root / name).mkdir()
        for split, columns in splits.items():
            Dataset.from_dict(columns, features).to_parquet(root / name / f"{split}.parquet")

    csv("good", train="text,label\n" + ROWS, test="text,label\n" + ROWS)
    csv("no_label", train="text\n" + "film\n" * 9)
    csv("no_input", train="a,label\n" + "1,0\n2,1\n" * 5)
    csv("two_texts", train="title,body,label\n" + "a,b,0\nc,d,1\n" * 5)
    csv("float_label", train="text,label\n" + "a,0.5\nb,1.5\n" * 5)
    csv("one_class", train="text,label\n" + "a,x\nb,x\n" * 5)
    csv("unseen_label", train="text,label\n" + ROWS, test="text,label\n" + ROWS + "film,new\n")
    csv("broken_csv", train='text,label\n"a,0\nb,1,2,3\n')
    labels = {"text": ["a", "b"] * 5, "label": [0, 1] * 5}
    parquet("unlabelled", TEXT, train=labels, test={"text": ["a"], "label": [-1]})
    parquet("empty_test", TEXT, train=labels, test={"text": [], "label": []})
    parquet("no_text_in_row", TEXT, train=labels, test={"text": ["a", None], "label": [0, 1]})
    images = [PILImage.new("RGB", (8, 8))] * 4
    parquet("two_labels", TWO_LABELS, train={"img": images, "fine": [0, 1] * 2, "coarse": [0, 1] * 2})
    for name, content in (("pets", None), ("broken_image", b"not a picture")):
        for i in range(8):
            path = root / name / "train" / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images[0].save(path) if content is None else path.write_bytes(content)

    (root / "empty").mkdir()
    (root / "no_weights").mkdir()
    (root / "no_weights" / "config.json").write_bytes((vit / "config.json").read_bytes())
    (root / "broken_weights").mkdir()
    for path in vit.iterdir():
        (root / "broken_weights" / path.name).write_bytes(path.read_bytes()[: 200 if "model" in path.name else None])
    (root / "bert").symlink_to(bert)
    (root / "vit").symlink_to(vit)
    (root / "file").write_text("a file")

    recipes = {
        "not_yaml": "a: [",
        "not_text": b"\xff\xfe\x00",
        "a_list": "- 1",
        "nothing": "",
        "unknown_key": "datasett: digits",
        "odd_key": "1: 2",
        "tag": f"dataset: !!python/object/apply:os.system ['touch {root / 'touched'}']",
        "runs_list": "runs: [a, b]",
        "runs_text": "runs: text",
        "runs_empty": "runs: {}",
        "run_no_mapping": "runs: {a: 1}",
        "run_date": "runs: {2026-01-01: {gd_beta: 1}}",
        "run_unknown": "runs: {a: {gd_betta: 2}}",
        "run_data": "runs: {a: {gd_beta: 1}, b: {max_train_samples: 5}}",
        "run_output": "runs: {a: {output_dir: x}}",
        "same_folder": "runs: {a b: {gd_beta: 1}, A-B: {gd_beta: 2}}",
        "bad_beta_in_run": "runs: {a: {gd_beta: 1}, b: {gd_beta: -1}}",
        "nan_in_run": "runs: {a: {gd_beta: .nan}}",
        "token": "hub_token: [a, b]",
    }
    for name, text in recipes.items():
        text = text if isinstance(text, bytes) else text.encode()
        (root / f"{name}.yaml").write_bytes(text)
    return root


DIGITS = "train --dataset digits --model timm:test_efficientnet --image_size 32"
SHORT = f"{DIGITS} --max_train_samples 128 --per_device_train_batch_size 32 --num_train_epochs 2"  # 8 updates
# Words are split at spaces; {T} is the folder of `things`. Then a regular expression, all of the message or its start.
BAD = [
    # The command and its flags
    (
        "bogus",
        r"there is no command 'bogus'; the commands are: train, study, timm, report, diagnose, card, push \(gd-.*\n",
    ),
    ("--foo", r"there is no command '--foo'"),
    ("train", r"no data set: give --dataset, a data set of the Hub"),
    ("train --dataset digits", r"no model: give --model"),
    (f"{DIGITS} --gd_betta 5", r"--gd_betta is not a flag of gd-plugin train; did you mean gd_beta\?\n"),
    (f"{DIGITS} --gd-betta=5", r"--gd-betta is not a flag of gd-plugin train; did you mean gd_beta\?\n"),
    (f"{DIGITS} --seeds 5", r"--seeds is not a flag of gd-plugin train, but of gd-plugin study\n"),
    (
        f"{DIGITS} --save_only_model",
        r"--save_only_model: a training could not go on from such checkpoints; leave it out",
    ),
    (
        f"{DIGITS} --ignore_data_skip",
        r"--ignore_data_skip: a training that goes on would see other batches; leave it out",
    ),
    ("train digits --resume --output_dir {T}/nothere", r"--resume: there is no \S+/nothere; give the --output_dir of"),
    (f"{DIGITS} --xyzzy", r"--xyzzy is not a flag of gd-plugin train; --help lists them\n"),
    (f"{DIGITS} --resum", r"--resum is not a flag of gd-plugin train; did you mean resume\?\n"),
    (f"{DIGITS} --image_size big", r"argument --image_size/--image-size: invalid int value: 'big'\n"),
    (f"{DIGITS} --gd_beta five", r"argument --gd_beta/--gd-beta: invalid float value: 'five'\n"),
    (f"{DIGITS} --gd_beta", r"argument --gd_beta/--gd-beta: expected at least one argument\n"),
    (f"{DIGITS} --use_cpu perhaps", r"argument --use_cpu/--use-cpu: Truthy value expected: got perhaps"),
    ("train --gd_beta 5 digits", r"argument --gd_beta/--gd-beta: invalid float value: 'digits'\n"),
    ("train digits digits", r"unrecognized arguments: digits\n"),
    # The method's own
    (f"{DIGITS} --gd_beta 0", r"gd_beta must be greater than 0, got 0\.0; 1 is cross-entropy"),
    (f"{DIGITS} --gd_beta -1", r"gd_beta must be greater than 0, got -1\.0"),
    (f"{DIGITS} --gd_beta nan", r"gd_beta must be finite, got nan\n"),
    (f"{DIGITS} --gd_beta inf", r"gd_beta must be finite, got inf\n"),
    (f"{DIGITS} --gd_beta 1 2 0", r"gd_beta must be greater than 0, got 0\.0"),
    (f"{DIGITS} --gd_schedule step", r"gd_schedule must be one of constant, linear, geometric, cosine, got 'step'\n"),
    (f"{DIGITS} --gd_beta_start 0.1", r"gd_beta_start is 0\.1 but the warm-up has no length; set gd_warmup_ratio"),
    (f"{DIGITS} --gd_warmup_ratio 0.5", r"gd_warmup_ratio is 0\.5 but gd_beta_start is not set; set gd_beta_start"),
    (f"{DIGITS} --gd_beta_start 0.1 --gd_warmup_ratio 1.5", r"gd_warmup_ratio must be in \[0, 1\], got 1\.5"),
    (f"{DIGITS} --gd_beta_start 0.1 --gd_warmup_steps -1", r"gd_warmup_steps must not be negative, got -1"),
    (
        f"{DIGITS} --gd_beta_start 0.1 --gd_warmup_ratio 0.5 --gd_warmup_steps 3",
        r"gd_warmup_steps and gd_warmup_ratio both set the warm-up's length; keep one of them\n",
    ),
    (
        f"{SHORT} --gd_beta_start 0.1 --gd_warmup_steps 9",
        r"gd_warmup_steps is 9, 9 updates, but training has only 8; lower gd_warmup_steps or train longer\n",
    ),
    (
        f"{SHORT} --gd_beta_start 0.1 --gd_warmup_epochs 2.5",
        r"gd_warmup_epochs is 2\.5, 10 updates, but training has only 8; lower gd_warmup_epochs",
    ),
    (f"{DIGITS} --gd_beta 1 2 3", r"gd_beta has 3 values for 10 classes; give one number, or one number per class\n"),
    (f"{DIGITS} --gd_class_weights 1 2", r"gd_class_weights has 2 values for 10 classes"),
    (f"{DIGITS} --gd_class_weights 1 -2", r"gd_class_weights must not be negative, got -2\.0\n"),
    # The Trainer's
    (f"{DIGITS} --num_train_epochs 0", r"--num_train_epochs must be greater than 0, got 0\.0\n"),
    (f"{DIGITS} --num_train_epochs nan", r"--num_train_epochs must be greater than 0, got nan\n"),
    (f"{DIGITS} --learning_rate -1", r"--learning_rate must not be negative, got -1\.0\n"),
    (f"{DIGITS} --per_device_train_batch_size 0", r"--per_device_train_batch_size must be at least 1, got 0\n"),
    (f"{DIGITS} --gradient_accumulation_steps 0", r"--gradient_accumulation_steps must be at least 1, got 0\n"),
    (f"{DIGITS} --report_to nowhere", r"--report_to nowhere: nowhere is not supported, only "),
    (f"{DIGITS} --metric_for_best_model f1", r"--metric_for_best_model f1: the metrics are loss, accuracy, nll, "),
    # Recipes
    (
        "train nope",
        r"there is no recipe nope; give a YAML file, or one .* package: cifar100_resnet18, .*, svhn_resnet18\n",
    ),
    ("train {T}/nope.yaml", r"there is no recipe \S+/nope\.yaml; give a YAML file"),
    ("train {T}/not_yaml.yaml", r"\S+/not_yaml\.yaml is not a YAML file: while parsing"),
    ("train {T}/not_text.yaml", r"\S+/not_text\.yaml is not a YAML file: 'utf-8' codec"),
    ("train {T}/a_list.yaml", r"\S+/a_list\.yaml must map flags to values"),
    ("train {T}/nothing.yaml", r"\S+/nothing\.yaml must map flags to values"),
    ("train {T}/unknown_key.yaml", r"\S+: datasett is not a flag of gd-plugin train; did you mean dataset\?\n"),
    ("train {T}/odd_key.yaml", r"\S+: 1 is not a flag of gd-plugin train; --help lists them\n"),
    ("train {T}/tag.yaml", r"\S+/tag\.yaml is not a YAML file: could not determine a constructor for the tag"),
    ("train {T}/runs_list.yaml", r"\S+/runs_list.yaml: runs must map names to values, such as `runs: "),
    ("train {T}/runs_text.yaml", r"--runs is not JSON \(.*\): text\n"),
    (
        "train {T}/runs_empty.yaml",
        r"--runs is empty: name at least one, such as \{five: \{gd_beta: 5\}\} in a recipe\n",
    ),
    ("train {T}/run_no_mapping.yaml", r"runs: a must map flags to values, got 1\n"),
    ("train {T}/run_date.yaml", r"\S+/run_date\.yaml: runs: keys must be .*; put it in quotes\n"),
    ("train {T}/run_unknown.yaml", r"runs: a: gd_betta is not a flag of gd-plugin train; did you mean gd_beta\?\n"),
    ("train {T}/run_data.yaml", r"runs: b sets max_train_samples, which all runs share; give it beside runs\n"),
    ("train {T}/run_output.yaml", r"runs: a sets output_dir, which all runs share; give it beside runs\n"),
    ("train {T}/same_folder.yaml", r"runs: two runs would share the folder \S+/out/a-b; give them other names\n"),
    ("train {T}/bad_beta_in_run.yaml", r"runs: b: gd_beta must be greater than 0, got -1\.0"),
    ("train {T}/nan_in_run.yaml", r"runs: a: gd_beta must be finite, got nan"),
    ("train {T}/token.yaml", r"unrecognized arguments: b\n"),
    ("train digits --gd_beta 2", r"--gd_beta is set by the run 'cross-entropy' of the recipe; leave it out, or give"),
    ("train digits --gd-warmup-ratio=1", r"--gd_warmup_ratio is set by the run 'beta 0\.01 to 5' of the recipe"),
    ('train digits --runs {{"a":{{}}', r"--runs is not JSON \(.*\): \{\"a\":\{\}\n"),
    ("train digits --runs [1]", r"--runs must be a JSON object, got \[1\]\n"),
    # Data
    ("train --dataset {T}/nowhere --model timm:x", r"--dataset \S+/nowhere: there is no such folder; give a data set"),
    ("train --dataset {T}/file --model timm:x", r"--dataset \S+/file is a file; give the folder that holds it"),
    ("train --dataset ./nowhere --model timm:x", r"--dataset \./nowhere: there is no such folder"),
    ("train --dataset no/such --model timm:x", r"--dataset no/such could not be loaded: \w+: .*no/such.* Hub"),
    ("train --dataset {T}/empty --model timm:x", r"--dataset \S+/empty could not be loaded: \w+: "),
    ("train --dataset {T}/broken_csv --model timm:x", r"--dataset \S+/broken_csv could not be loaded: \w+: "),
    (
        "train --dataset {T}/no_label --model {T}/bert",
        r"no label column \(the columns are text\); choose one with --lab",
    ),
    (
        "train --dataset {T}/two_labels --model {T}/vit",
        r"several label columns, fine, coarse \(.*\); choose one with -",
    ),
    ("train --dataset {T}/no_input --model {T}/bert", r"no image or text column among a, label; name it with --image_"),
    (
        "train --dataset {T}/two_texts --model {T}/bert",
        r"several text columns, title, body; choose one with --text_col",
    ),
    (
        "train --dataset {T}/good --model {T}/bert --image_column text --text_column text",
        r"--image_column and --text_column are both given; keep the one to classify\n",
    ),
    (
        "train --dataset {T}/good --model {T}/bert --text_column body",
        r"--text_column body: there is no such column; the columns are text, label\n",
    ),
    (
        "train --dataset {T}/good --model {T}/bert --label_column stars",
        r"--label_column stars: there is no such column; the columns are text, label\n",
    ),
    (
        "train --dataset {T}/good --model {T}/bert --image_column text",
        r"--image_column text: that column holds .*, not images\n",
    ),
    (
        "train --dataset {T}/two_labels --label_column img --model {T}/vit",
        r"the label column 'img' holds Image.*, not classes; choose one with --label_column\n",
    ),
    ("train --dataset {T}/float_label --model {T}/bert", r"the label column 'label' holds Value\('float64'\), not cla"),
    (
        "train --dataset {T}/one_class --model {T}/bert",
        r"the label column 'label' has 1 class; a classifier needs at l",
    ),
    ("train --dataset {T}/unlabelled --model {T}/bert", r"row 0 has the label -1, outside the 2 classes of the train"),
    ("train --dataset {T}/unseen_label --model {T}/bert", r"row 10 has the label 'new', outside the 2 classes of the"),
    ("train --dataset {T}/no_text_in_row --model {T}/bert", r"row 1 has no text; mend the data\n"),
    (
        "train --dataset {T}/empty_test --model {T}/bert",
        r"--dataset \S+/empty_test could not be loaded: ValueError: .*test.* no",
    ),
    (f"{DIGITS} --train_split dev", r"digits has no split 'dev', only train, test; choose one with --train_split\n"),
    (f"{DIGITS} --validation_split dev", r"digits has no split 'dev', only train, test; choose one with --validation_"),
    (f"{DIGITS} --test_split dev", r"digits has no split 'dev', only train, test; choose one with --test_split\n"),
    (f"{DIGITS} --validation_fraction 1", r"--validation_fraction must be between 0 and 1, got 1\.0\n"),
    (f"{DIGITS} --max_train_samples 0", r"--max_train_samples must be at least 1, got 0\n"),
    (f"{DIGITS} --max_eval_samples -3", r"--max_eval_samples must be at least 1, got -3\n"),
    ("train --dataset {T}/broken_image --model {T}/vit", r"image 0 of the data set cannot be decoded: cannot identify"),
    # Models
    ("train --dataset {T}/pets --model {T}/nowhere", r"--model \S+/nowhere is not a model for image classification: "),
    ("train --dataset {T}/pets --model no/such", r"--model no/such is not a model for image classification: "),
    ("train --dataset {T}/pets --model {T}/empty", r"--model \S+/empty is not a model for image classification: "),
    ("train --dataset {T}/pets --model {T}/bert", r"--model \S+/bert is not a model for image classification: "),
    ("train --dataset {T}/pets --model {T}/no_weights", r"--model \S+/no_weights is not a model for image classific"),
    ("train --dataset {T}/pets --model {T}/broken_weights", r"--model \S+/broken_weights is not a model for image cl"),
    ("train --dataset {T}/good --model {T}/vit", r"--model \S+/vit is not a model for text classification: "),
    ("train --dataset {T}/good --model timm:test_vit", r"--model timm:test_vit classifies images, and good holds text"),
    (
        "train --dataset digits --model timm:test_efficientnett",
        r"--model timm:test_efficientnett: timm has no such architecture; did you mean test_efficientnet, .*\?\n",
    ),
    ("train --dataset digits --model timm:", r"--model timm:: timm has no such architecture; timm\.list_models\(\) na"),
    (f"{DIGITS} --model_args {{{{", r"--model_args is not JSON \(.*\): \{\n"),
    (f"{DIGITS} --model_args 3", r"--model_args must be a JSON object, got 3\n"),
    (
        f'{DIGITS} --model_args {{{{"width":2}}}}',
        r"--model timm:test_efficientnet with --model_args .*keyword argument 'wi",
    ),
    (f'{DIGITS} --model_args {{{{"in_chans":1}}}}', r"--model timm:test_efficientnet does not take these data, or lac"),
    (f"{DIGITS} --image_size 0", r"--image_size must be at least 1, got 0\n"),
    (f"{DIGITS} --image_size -32", r"--image_size must be at least 1, got -32\n"),
    ("train --dataset digits --model timm:test_vit --image_size 33", r"--model timm:test_vit does not take these data"),
    # The output folder
    (f"{DIGITS} --output_dir {{T}}/file", r"--output_dir \S+/file: \S+/file is a file; give a folder\n"),
    (f"{DIGITS} --output_dir {{T}}/file/below", r"--output_dir \S+/file/below: \S+/file is a file; give a folder\n"),
    (f"{DIGITS} --overwrite --resume", r"--overwrite and --resume contradict each other; keep one\n"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words.replace(DIGITS, "") for words, _ in BAD])
def test_bad_input(command, things, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    words = [word.format(T=things) for word in words.split()]
    if words[0] == "train" and "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "out")]
    before = sorted(things.rglob("*"))
    code, _, err = command(*words)
    assert code == 2
    assert re.match("gd-plugin: error: " + message, err), err
    assert err.count("\n") == 1 and err.endswith("\n") and len(err) < 1200
    assert list(tmp_path.iterdir()) == []
    assert sorted(things.rglob("*")) == before  # the recipe's Python tag touched nothing


def test_the_good_data_and_model_of_the_table_are_good(train, things, tmp_path):
    """Or every row of it might fail for another reason."""
    train("--dataset", things / "good", "--model", things / "bert", "--use_cpu", "true", output_dir=tmp_path)
    train("--dataset", things / "pets", "--model", things / "vit", "--use_cpu", "true", output_dir=tmp_path / "pets")


def test_a_bad_run_stops_before_the_first_one_trains(command, small, tmp_path):
    runs = json.dumps({"good": {"gd_beta": 1}, "bad": {"gd_beta_start": 0.1, "gd_warmup_steps": 999}})
    outcome = command("train", "--dataset", "digits", *small, "--runs", runs, "--output_dir", tmp_path / "out")
    assert outcome.code == 2 and "gd_warmup_steps is 999" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["transformers", "datasets", "rich", "matplotlib", "sklearn", "timm"])
def test_missing_package(start, tmp_path, name):
    argv = [*DIGITS.split(), "--output_dir", tmp_path / "out"]
    process = start(argv, tmp_path / "err", missing=name)
    process.join(60)
    extra = "timm" if name == "timm" else "hf"
    expected = f"gd-plugin: error: the package {name} is missing: pip install 'gd_plugin[{extra}]'\n"
    assert (process.exitcode, (tmp_path / "err").read_text()) == (2, expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help(command, words):
    code, out, err = command(*words)
    assert (code, err) == (0 if words else 2, "")
    assert "usage: gd-plugin COMMAND" in out and "train [RECIPE]" in out and "train --help" in out


def test_version(command, monkeypatch, capsys):
    assert command("--version") == (0, gd_plugin.__version__ + "\n", "")
    monkeypatch.setattr("sys.argv", ["gd-plugin", "--version"])
    assert main() == 0  # as the console script calls it
    assert capsys.readouterr().out == gd_plugin.__version__ + "\n"


def test_help_of_train_names_every_flag_of_ours(command):
    import dataclasses

    from gd_plugin.arguments import DataArguments, ModelArguments, RunArguments
    from gd_plugin.config import GradientDecayConfig

    code, out, err = command("train", "--help")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    flags = [f.name for c in (DataArguments, ModelArguments, RunArguments) for f in dataclasses.fields(c)]
    flags += [f"gd_{f.name}" for f in dataclasses.fields(GradientDecayConfig)]
    assert len(flags) > 20
    value = r"( [A-Z_\[\] .]+| \{[\w,]+\})?"
    for flag in flags:
        # The name, perhaps with dashes too, what it takes, and a sentence that says what it is.
        assert re.search(rf"--{flag}{value}(, --[\w-]+{value})? [A-Z`][^-]{{15,}}", text), flag
    assert "gd-plugin train [RECIPE]" in text and "--learning_rate" in text
