"""Data sets, recipes, records and studies that are wrong in one way each, for test_hostile_input.py."""

import json
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

GD = {
    "beta": 5.0,
    "beta_start": None,
    "schedule": "linear",
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "warmup_epochs": 0.0,
    "class_weights": None,
}
RECORD = {
    "format": 1,
    "name": "beta 5",
    "created": "2026-01-01T00:00:00+00:00",
    "command": "gd-plugin train digits",
    "config": {"dataset": "digits", "num_train_epochs": 1.0},
    "seed": 0,
    "loss": "gd",
    "gd": GD,
    "wall_time_s": 2.5,
    "dataset": {"name": "digits", "kind": "image", "train": 128, "validation": 64, "test": 64, "tested_on": "test"},
    "model": {"name": "timm:test_vit", "parameters": 1000},
    "epochs": [{"epoch": 1.0, "step": 4, "loss": 1.0, "cross_entropy": 1.0, "gd_beta": 5.0, "eval_accuracy": 0.5}],
    "log": [{"epoch": 0.25, "step": 1, "gd_beta": 5.0}],
    "final": {"accuracy": 0.5, "nll": 1.25, "brier": 0.5, "ece": 0.125, "confidence_gap": 0.0625},
    "calibrated": None,
    "reliability": [{"lower": 0.0, "upper": 1.0, "count": 64, "confidence": 0.5, "accuracy": 0.5}],
    "python": "3.12.0",
    "platform": "Linux",
    "versions": {"torch": "2.9.0"},
    "commit": None,
    "hardware": {"cpu": "a CPU", "cpu_count": 1, "gpu": [], "gpu_count": 0, "torch_threads": 1},
}
STUDY = {"format": 1, "dataset": "digits", "methods": ["ce", "beta 5"], "seeds": [0], "command": "gd-plugin study x"}
TEXT = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
PETS = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


def without(*keys):
    return {key: value for key, value in RECORD.items() if key not in keys}


def wrong(**changes):
    """A record with something else in it; ``dataset__name`` is in its ``dataset``."""
    record = json.loads(json.dumps(RECORD))
    for key, value in changes.items():
        *way, last = key.split("__")
        place = record
        for name in way:
            place = place[name]
        place[last] = value
    return record


# The content of a folder's record.json.
RECORDS = {
    "good": RECORD,
    "no_json": "{",
    "empty_file": "",
    "binary": b"\x89PNG\r\n\x1a\n\x00\xff",
    "list": [RECORD],
    "text": '"a record"',
    "null": "null",
    "deep": "[" * 100_000,
    "huge_integer": '{"format": 1' + "0" * 5000 + "}",
    "no_format": without("format"),
    "newer": wrong(format=2),
    "format_text": wrong(format="1"),
    "format_true": wrong(format=True),
    "cut_short": without("epochs", "final"),
    "name_list": wrong(name=["a"]),
    "name_number": wrong(name=5),
    "config_list": wrong(config=[]),
    "seed_text": wrong(seed="0"),
    "dataset_text": wrong(dataset="digits"),
    "dataset_name_null": wrong(dataset__name=None),
    "dataset_no_name": wrong(dataset={"tested_on": "test"}),
    "kind_hostile": wrong(dataset__kind='image")\n```\n<script>'),
    "test_text": wrong(dataset__test="many"),
    "epochs_text": wrong(epochs="none"),
    "epochs_numbers": wrong(epochs=[1, 2]),
    "epoch_text": wrong(epochs=[{"epoch": "first", "step": 1}]),
    "log_null_entry": wrong(log=[None]),
    "final_list": wrong(final=[0.5]),
    "accuracy_text": wrong(final__accuracy="high"),
    "accuracy_huge": wrong(final__accuracy=10**400),
    "wall_time_text": wrong(wall_time_s="2 s"),
    "wall_time_null": wrong(wall_time_s=None),
    "reliability_text": wrong(reliability="good"),
    "reliability_short": wrong(reliability=[{"lower": 0.0}]),
    "gd_text": wrong(gd="beta 5"),
    "beta_text": wrong(gd__beta="<b>5</b>"),
    "schedule_hostile": wrong(gd__schedule="<script>"),
    "model_text": wrong(model="resnet"),
    "no_model": without("model"),
    "no_gd": without("gd"),
    "calibrated_text": wrong(calibrated="yes"),
    "hardware_text": wrong(hardware="a GPU"),
    "card_task": wrong(card={"task": 'image")\n```'}),
    "two_names": json.dumps(RECORD)[:-1] + ', "name": "another"}',
}
# The content of a folder's study.json, beside a good run of each method.
STUDIES = {
    "good_study": STUDY,
    "study_no_json": "{",
    "study_list": [STUDY],
    "study_newer": {**STUDY, "format": 2},
    "study_no_methods": {**STUDY, "methods": []},
    "study_methods_text": {**STUDY, "methods": "ce"},
    "study_methods_lists": {**STUDY, "methods": [["ce"]]},
    "study_seeds_paths": {**STUDY, "seeds": ["../../good"]},
    "study_seeds_number": {**STUDY, "seeds": 3},
    "study_deep": "[" * 100_000,
    "study_of_others": {**STUDY, "methods": ["other"]},
}
# Recipes: files that are no recipe, or ask for what cannot be.
RECIPES = {
    "syntax.yaml": "dataset: [digits",
    "tabs.yaml": "runs:\n\ta: 1",
    "binary.yaml": b"\x89PNG\r\n\x1a\n\x00\xff",
    "latin1.yaml": "dataset: é".encode("latin-1"),
    "nul.yaml": "dataset: a\0b",
    "empty.yaml": "",
    "list.yaml": "- digits",
    "number.yaml": "5",
    "two_documents.yaml": "dataset: digits\n---\ndataset: x",
    "unknown_key.yaml": "gd_betta: 5",
    "null_key.yaml": "null: 5",
    "list_key.yaml": "? [a, b]\n: 5",
    "twice.yaml": "gd_beta: 1\ndataset: digits\ngd_beta: 5",
    "twice_in_runs.yaml": "runs:\n  a: {gd_beta: 1}\n  a: {gd_beta: 5}",
    "laughs.yaml": LAUGHS + "dataset: *i",
    "laughs_in_runs.yaml": "runs:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines()),
    "itself.yaml": "runs: &a\n  b: *a",
    "deep.yaml": "runs: " + "[" * 5000 + "]" * 5000,
    "long.yaml": "dataset: digits\n" + "# a comment\n" * 200_000,
    "os_system.yaml": "dataset: !!python/object/apply:os.system ['touch {T}/touched']",
    "python_name.yaml": "dataset: !!python/name:os.system",
    "python_tuple.yaml": "gd_beta: !!python/tuple [1, 2]",
    "date.yaml": "dataset: 2026-13-45",
    "timestamp.yaml": "dataset: !!timestamp yesterday",
    "no_float.yaml": "gd_beta: !!float five",
    "no_bool.yaml": "use_cpu: !!bool perhaps",
    "beta_text.yaml": "dataset: digits\nmodel: timm:test_vit\ngd_beta: five",
    "beta_map.yaml": "dataset: digits\nmodel: timm:test_vit\ngd_beta: {a: 1}",
    "beta_nan.yaml": "dataset: digits\nmodel: timm:test_vit\ngd_beta: .nan",
    "beta_inf.yaml": "dataset: digits\nmodel: timm:test_vit\ngd_beta: .inf",
    "beta_negative.yaml": "dataset: digits\nmodel: timm:test_vit\ngd_beta: -0.5",
    "beta_true.yaml": "dataset: digits\nmodel: timm:test_vit\ngd_beta: true",
    "beta_nested.yaml": "dataset: digits\nmodel: timm:test_vit\ngd_beta: [[1, 2], 3]",
    "dataset_list.yaml": "dataset: [digits, mnist]\nmodel: timm:test_vit",
    "runs_null.yaml": "dataset: digits\nmodel: timm:test_vit\nruns: {a: null}",
    "runs_dates.yaml": "runs: {a: {run_name: 2026-01-01}}",
    "runs_set.yaml": "runs: !!set {a, b}",
    "json_in_runs.yaml": "dataset: digits\nruns: '{\"a\": '",
    "recipe.json": '{"dataset": "digits", "gd_beta": ',
    "list.json": '["digits"]',
    "twice.json": '{"dataset": "digits", "dataset": "mnist"}',
    "nan.json": '{"dataset": "digits", "model": "timm:test_vit", "gd_beta": NaN}',
}


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def make_things(root: Path, bert: Path, vit: Path) -> Path:
    """Data sets, recipes, records and studies that are wrong in one way each, but for the good ones."""

    def csv(name, **splits):
        for split, rows in splits.items():
            write(root / name / f"{split}.csv", rows)

    def parquet(name, features, **splits):
        for split, columns in splits.items():
            (root / name).mkdir(exist_ok=True)
            Dataset.from_dict(columns, features).to_parquet(root / name / f"{split}.parquet")

    rows = "".join(f"film {i},{'neg' if i % 2 else 'pos'}\n" for i in range(10))
    csv("texts", train="text,label\n" + rows, test="text,label\n" + rows)
    csv("no_labels", train="text\n" + "film\n" * 9)
    csv("no_inputs", train="a,label\n" + "1,0\n2,1\n" * 5)
    csv("float_labels", train="text,label\n" + "a,0.5\nb,1.5\n" * 5)
    csv("date_labels", train="text,label\n" + "a,2026-01-01\nb,2026-01-02\n" * 5)
    csv("one_class", train="text,label\n" + "a,x\nb,x\n" * 5)
    csv("one_row", train="text,label\nfilm,pos\n")
    csv("header_only", train="text,label\n")
    csv("other_classes", train="text,label\n" + rows, test="text,label\nfilm,new\n")
    csv("only_test", test="text,label\n" + rows)
    csv("two_columns", train="title,body,label\n" + "a,b,0\nc,d,1\n" * 5)
    csv("cut_csv", train='text,label\n"a,0\nb,1,2,3\n')
    write(root / "cut_json" / "train.jsonl", '{"text": "a", "label": 0}\n{"text": ')
    write(root / "no_parquet" / "train.parquet", b"PAR1 and no more")
    columns = {"text": ["a", "b"] * 5, "label": [0, 1] * 5}
    parquet("unlabelled", TEXT, train=columns, test={"text": ["a"], "label": [-1]})
    parquet("no_text", TEXT, train=columns, test={"text": ["a", None], "label": [0, 1]})
    parquet("list_labels", Features({"text": Value("string"), "label": List(Value("int64"))}),
            train={"text": ["a", "b"] * 5, "label": [[0], [1, 2]] * 5})  # fmt: skip
    no_range = Features({"text": Value("string"), "label": Value("int64")})
    parquet("outside", no_range, train=columns, test={"text": ["a", "b"], "label": [0, 7]})
    picture = PILImage.new("RGB", (8, 8))
    parquet("no_picture", PETS, train={"image": [picture] * 9 + [None], "label": [0, 1] * 5})
    for name, content in (("pets", None), ("no_pictures", b"not a picture"), ("cut_pictures", b"\x89PNG\r\n\x1a\n")):
        for i in range(8):
            path = root / name / "train" / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path) if content is None else path.write_bytes(content)
    for i in range(4):
        (root / "one_pet" / "train" / "cat").mkdir(parents=True, exist_ok=True)
        picture.save(root / "one_pet" / "train" / "cat" / f"{i}.png")
    (root / "empty").mkdir()
    write(root / "a_file", "a file")
    (root / "bert").symlink_to(bert)
    (root / "vit").symlink_to(vit)

    for name, text in RECIPES.items():
        write(root / name, text.replace("{T}", str(root)) if isinstance(text, str) else text)
    (root / "folder.yaml").mkdir()
    for name, record in RECORDS.items():
        write(root / "records" / name / "run" / "record.json", record)
    (root / "records" / "folder" / "run" / "record.json").mkdir(parents=True)
    write(root / "good" / "run" / "record.json", RECORD)
    for name, study in STUDIES.items():
        write(root / name / "study.json", study)
        write(root / name / "seed-0" / "ce.json", {**wrong(gd__beta=1.0), "name": "ce"})
        write(root / name / "seed-0" / "beta-5.json", RECORD)
    write(root / "study_bad_record" / "study.json", STUDY)
    write(root / "study_bad_record" / "seed-0" / "ce.json", {**wrong(final=3), "name": "ce"})
    write(root / "study_other_seed" / "study.json", STUDY)
    write(root / "study_other_seed" / "seed-0" / "ce.json", {**RECORD, "name": "ce", "seed": 4})
    write(root / "config" / "gd.yaml", "loss: gd\ngd_betta: 5")
    write(root / "damaged_trace" / "a" / "record.json", RECORD)
    write(root / "damaged_trace" / "a" / "trace.npz", b"PK no zip")
    return root
