"""Data sets from real files: which column and split is taken, and what a model gets to see."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import AutoImageProcessor, AutoTokenizer

from gd_plugin.arguments import DataArguments
from gd_plugin.data import PreparedImages, PreparedTexts, load_data

IMAGES = Features({"img": Image(), "fine_label": ClassLabel(names=["cat", "dog"])})
COARSE = Features({**IMAGES, "coarse_label": ClassLabel(names=["pet", "wild", "none"])})


def picture(seed=0, mode="RGB", size=(8, 8)):
    rgb = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return PILImage.fromarray(rgb).convert(mode)


def image_folder(folder, splits, classes=("cat", "dog"), per_class=4, mode="RGB"):
    for split in splits:
        for label in classes:
            (folder / split / label).mkdir(parents=True)
            for i in range(per_class):
                picture(i, mode).save(folder / split / label / f"{i}.png")
    return folder


def parquet(folder, features, **splits):
    folder.mkdir(exist_ok=True)
    for name, columns in splits.items():
        Dataset.from_dict(columns, features).to_parquet(folder / f"{name}.parquet")
    return folder


def load(dataset, **flags):
    return load_data(DataArguments(dataset=str(dataset), **flags))


def csv(folder, **splits):
    folder.mkdir(exist_ok=True)
    for name, text in splits.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


def texts(n, labels=("neg", "pos"), start=0):
    return "text,label\n" + "".join(f"film {start + i},{labels[i % len(labels)]}\n" for i in range(n))


def test_a_folder_that_is_named_like_a_builder_of_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    csv(tmp_path / "csv", train=texts(8), test=texts(4))
    picture().save(tmp_path / "picture.png")  # the builder `csv` would read whatever lies here
    assert len(load("csv").test) == 4


# Columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_image_folder_of_any_mode(tmp_path, vit, mode):
    data = load(image_folder(tmp_path / "pets", ["train", "test"], mode=mode))
    assert (data.kind, data.name, data.label_names) == ("image", "pets", ["cat", "dog"])
    assert data.train.inputs[0]["input"].mode == mode  # the files are what they claim to be
    # Every mode becomes three channels, with the values that Pillow gives them.
    item = PreparedImages(data.test, AutoImageProcessor.from_pretrained(vit))[0]
    processor = AutoImageProcessor.from_pretrained(vit)
    expected = processor(picture(0, mode).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert item["pixel_values"].shape == (3, 16, 16)
    torch.testing.assert_close(item["pixel_values"], expected)
    assert not torch.equal(item["pixel_values"], processor(picture(1), return_tensors="pt")["pixel_values"][0])


def test_columns_are_found_by_their_type(tmp_path):
    rows = {"img": [picture(i) for i in range(10)], "fine_label": [0, 1] * 5}
    data = load(parquet(tmp_path / "a", IMAGES, train=rows, test=rows))
    assert (data.kind, data.label_names, data.test.labels.tolist()) == ("image", ["cat", "dog"], [0, 1] * 5)
    assert data.train.labels.dtype == torch.int64


def test_two_label_columns_need_a_flag(tmp_path):
    rows = {"img": [picture(i) for i in range(10)], "fine_label": [0, 1] * 5, "coarse_label": [2, 1] * 5}
    folder = parquet(tmp_path / "a", COARSE, train=rows, test=rows)
    with pytest.raises(ValueError, match=r"several label columns, fine_label, coarse_label .* --label_column"):
        load(folder)
    assert load(folder, label_column="fine_label").test.labels.tolist() == [0, 1] * 5
    coarse = load(folder, label_column="coarse_label")
    assert (coarse.test.labels.tolist(), coarse.label_names) == ([2, 1] * 5, ["pet", "wild", "none"])


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pos", "neg", "pos", "neg"], ["neg", "pos"]),
        ([10, 9, 10, 9], ["9", "10"]),  # in the order of the numbers, not of their texts
        ([True, False, True, False], ["False", "True"]),
    ],
)
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_text_with_labels_of_several_types(tmp_path, labels, names, form):
    for split in ("train", "validation", "test"):
        rows = [(f"good film {i}", label) for i, label in enumerate(labels)]
        if form == "csv":
            text = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
        else:
            text = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        (tmp_path / f"{split}.{form}").write_text(text)
    data = load(tmp_path)
    assert (data.kind, data.label_names) == ("text", names)
    assert data.test.inputs["input"][:] == [f"good film {i}" for i in range(4)]
    assert [names[i] for i in data.test.labels] == [str(label) for label in labels]


def test_text_and_label_columns_by_flag(tmp_path):
    folder = csv(tmp_path, train="title,body,stars\n" + "a,b,1\nc,d,2\n" * 5)
    with pytest.raises(ValueError, match="several text columns, title, body; choose one with --text_column"):
        load(folder, label_column="stars")
    with pytest.raises(ValueError, match=r"no label column .* title, body, stars.; choose one with --label_column"):
        load(folder)
    data = load(folder, text_column="body", label_column="stars")
    assert data.label_names == ["1", "2"]
    assert set(data.train.inputs["input"][:]) == {"b", "d"}


def test_long_text_is_cut_to_what_the_model_reads(tmp_path, bert):
    from gd_plugin.arguments import ModelArguments
    from gd_plugin.models import build_model

    data = load(csv(tmp_path, train="text,label\n" + f"{'good ' * 50},pos\nbad,neg\n" * 5))
    model, tokenizer = build_model(ModelArguments(model=str(bert)), data)
    longest = max((PreparedTexts(data.train, tokenizer)[i]["input_ids"] for i in range(len(data.train))), key=len)
    assert len(longest) == model.config.max_position_embeddings == 16
    # Without that the tokenizer of this folder cuts nothing.
    assert len(AutoTokenizer.from_pretrained(bert)("good " * 50, truncation=True)["input_ids"]) == 52


# Splits ---------------------------------------------------------------------------------------------------------------


def test_a_validation_split_is_used_where_there_is_one(tmp_path):
    data = load(csv(tmp_path, train=texts(20), validation=texts(6, start=100), test=texts(8, start=200)))
    assert data.describe() == {
        "name": tmp_path.name,
        "kind": "text",
        "train": 20,
        "validation": 6,
        "test": 8,
        "tested_on": "test",
        "labels": ["neg", "pos"],
    }
    assert data.validation.inputs["input"][:] == [f"film {i}" for i in range(100, 106)]


def test_a_validation_split_is_cut_where_there_is_none(tmp_path):
    folder = csv(tmp_path, train=texts(40), test=texts(8, start=200))
    first, second = load(folder, validation_fraction=0.25), load(folder, validation_fraction=0.25)
    parts = [set(split.inputs["input"][:]) for split in (first.train, first.validation)]
    assert [len(part) for part in parts] == [30, 10]
    assert parts[0] | parts[1] == {f"film {i}" for i in range(40)}  # and so nothing is in both
    # It must not depend on the seed of the run, or runs of two seeds could not be compared.
    torch.manual_seed(1)
    np.random.seed(1)
    assert load(folder, validation_fraction=0.25).validation.inputs["input"][:] == first.validation.inputs["input"][:]
    assert second.validation.inputs["input"][:] == first.validation.inputs["input"][:]
    assert set(load(folder, validation_fraction=0.5).validation.inputs["input"][:]) != parts[1]
    assert first.tested_on == "test"


@pytest.mark.parametrize(
    ("splits", "tested_on"), [({"train": 20}, "0.1 of train"), ({"train": 20, "validation": 6}, "validation")]
)
def test_without_a_test_split_the_data_say_what_is_tested(tmp_path, splits, tested_on):
    data = load(csv(tmp_path, **{name: texts(n) for name, n in splits.items()}))
    assert data.tested_on == tested_on
    assert data.test.inputs["input"][:] == data.validation.inputs["input"][:]


def test_splits_and_sizes_by_flag(tmp_path):
    folder = csv(tmp_path, train=texts(20), test=texts(8, start=200))
    data = load(folder, train_split="test", validation_split="train", test_split="train", max_eval_samples=3)
    assert (len(data.train), len(data.validation), len(data.test), data.tested_on) == (8, 3, 3, "train")
    assert len(load(folder, max_train_samples=5).train) == 5
    assert len(load(folder, max_train_samples=500).train) == 18  # as many as there are


def test_class_names_of_a_split_that_misses_some_of_them(tmp_path):
    data = load(csv(tmp_path, train=texts(30, "abc"), test=texts(4, "cb", start=100)))
    assert (data.label_names, data.test.labels.tolist()) == (["a", "b", "c"], [2, 1, 2, 1])


def test_digits_are_the_same_every_time():
    one, two = (load("digits") for _ in range(2))
    assert (len(one.train), len(one.validation), len(one.test)) == (1293, 144, 360)
    for a, b in ((one.train, two.train), (one.validation, two.validation), (one.test, two.test)):
        assert torch.equal(a.labels, b.labels)
    assert np.array_equal(np.asarray(one.test.inputs[7]["input"]), np.asarray(two.test.inputs[7]["input"]))
    assert one.test.labels.bincount().min() >= 34  # a fifth of every class


def test_images_too_large_for_memory_are_decoded_again(tmp_path, vit, monkeypatch):
    data = load(image_folder(tmp_path / "pets", ["train", "test"]))
    processor = AutoImageProcessor.from_pretrained(vit)
    kept = PreparedImages(data.test, processor)
    monkeypatch.setattr("gd_plugin.data._CACHE_BYTES", 100)
    decoded = PreparedImages(data.test, processor)
    assert kept.pixels is not None and decoded.pixels is None
    for a, b in zip(kept, decoded, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"]) and a["labels"] == b["labels"]


# Broken files ---------------------------------------------------------------------------------------------------------

TEXT = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a", "b"] * 5, "label": [0, -1] * 5}, r"row 1 has the label -1, outside the 2 classes"),
        ({"text": ["a", "b"] * 5, "label": [0, None] * 5}, r"row 1 has the label None, outside the 2 classes"),
    ],
)
def test_rows_without_a_label(tmp_path, rows, message):
    good = {"text": ["a", "b"] * 5, "label": [0, 1] * 5}
    assert len(load(parquet(tmp_path / "good", TEXT, train=good, test=good)).test) == 10
    with pytest.raises(ValueError, match=message):
        load(parquet(tmp_path / "bad", TEXT, train=good, test=rows))


def test_rows_without_a_text(tmp_path, bert):
    good = {"text": ["a", "b"] * 5, "label": [0, 1] * 5}
    bad = {"text": ["a", "b", None, "b"], "label": [0, 1, 0, 1]}
    data = load(parquet(tmp_path / "a", TEXT, train=good, test=bad))
    assert len(PreparedTexts(data.train, AutoTokenizer.from_pretrained(bert))) == 9
    with pytest.raises(ValueError, match="row 2 has no text"):
        PreparedTexts(data.test, AutoTokenizer.from_pretrained(bert))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, None])
def test_images_that_cannot_be_decoded(tmp_path, vit, content):
    if content is None:  # a file that was cut off in the middle
        picture(size=(64, 64)).save(tmp_path / "whole.png")
        content = (tmp_path / "whole.png").read_bytes()[:2000]
    rows = {"img": [{"bytes": content, "path": None}] * 4, "fine_label": [0, 1] * 2}
    data = load(parquet(tmp_path / "a", IMAGES, train=rows))
    with pytest.raises(ValueError, match="image 0 of the data set cannot be decoded"):
        PreparedImages(data.train, AutoImageProcessor.from_pretrained(vit))
