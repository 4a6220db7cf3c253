"""The knobs as training arguments: flags, dictionaries, YAML and JSON files, and back."""

import json

import pytest
import torch
import yaml
from hf_models import CLASSES, WAYS, distance, make_arguments, make_data, make_model, weights
from transformers import HfArgumentParser, Trainer, TrainingArguments

from gd_plugin.config import GradientDecayConfig
from gd_plugin.hf import GradientDecayTrainer, GradientDecayTrainingArguments

# (what is given, the configuration that comes of it)
CASES = {
    "nothing": ({}, {}),
    "a number": (dict(gd_beta=5.0), dict(beta=5.0)),
    "an integer": (dict(gd_beta=5), dict(beta=5.0)),
    "per class": (dict(gd_beta=[1.0, 2.0, 3.0]), dict(beta=(1.0, 2.0, 3.0))),
    "per class of integers": (dict(gd_beta=[1, 2, 3]), dict(beta=(1.0, 2.0, 3.0))),
    "warm-up": (
        dict(gd_beta=5.0, gd_beta_start=0.01, gd_warmup_ratio=0.5, gd_schedule="geometric"),
        dict(beta=5.0, beta_start=0.01, warmup_ratio=0.5, schedule="geometric"),
    ),
    "steps": (dict(gd_beta_start=0.01, gd_warmup_steps=100), dict(beta_start=0.01, warmup_steps=100)),
    "epochs": (dict(gd_beta_start=0.01, gd_warmup_epochs=1.5), dict(beta_start=0.01, warmup_epochs=1.5)),
    "start per class": (
        dict(gd_beta_start=[0.01, 0.1], gd_warmup_steps=2),
        dict(beta_start=(0.01, 0.1), warmup_steps=2),
    ),
    "class weights": (dict(gd_class_weights=[0.5, 1.5]), dict(class_weights=(0.5, 1.5))),
}


def parser():
    return HfArgumentParser(GradientDecayTrainingArguments)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("source", ["python", "flags", "flags with dashes", "dictionary", "yaml", "json"])
def test_every_source_gives_the_same_configuration(source, name, tmp_path):
    given, expected = CASES[name]
    everything = {"output_dir": str(tmp_path), "use_cpu": True} | given
    if source == "python":
        arguments = GradientDecayTrainingArguments(**everything)
    elif source == "dictionary":
        [arguments] = parser().parse_dict(everything)
    elif source == "yaml":
        path = tmp_path / "arguments.yaml"
        path.write_text(yaml.safe_dump(everything))
        [arguments] = parser().parse_yaml_file(path)
    elif source == "json":
        path = tmp_path / "arguments.json"
        path.write_text(json.dumps(everything))
        [arguments] = parser().parse_json_file(path)
    else:
        flags = []
        for key, value in everything.items():
            flags.append("--" + (key.replace("_", "-") if "dashes" in source else key))
            flags.extend(map(str, value if isinstance(value, list) else [value]))
        [arguments] = parser().parse_args_into_dataclasses(flags)
    assert arguments.gd_config == GradientDecayConfig(**expected)
    assert arguments.gd_config != GradientDecayConfig(beta=7.0)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, tmp_path):
    """Through the dictionary, the JSON text and the pickle that a checkpoint holds."""
    arguments = make_arguments(tmp_path, **CASES[name][0])
    by_dict = arguments.to_dict()
    by_text = json.loads(arguments.to_json_string())
    for values in (by_dict, by_text):
        ours = {key: value for key, value in values.items() if key.startswith("gd_")}
        fields = {f"gd_{field}" for field in GradientDecayConfig.__dataclass_fields__}
        assert set(ours) == fields | {"gd_fused_linear"}
        again = make_arguments(tmp_path, **ours)
        assert again.gd_config == arguments.gd_config
    torch.save(arguments, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).gd_config == arguments.gd_config


def test_flags_have_help(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args_into_dataclasses(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in GradientDecayConfig.__dataclass_fields__:
        assert f"--gd_{field}" in text
    assert "Gradient-decay coefficient > 0: 1 is cross-entropy" in text


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_the_defaults_are_cross_entropy(name, tmp_path):
    """The weights of the ordinary Trainer, whose loss for these models is right; and beta = 2 brings others."""
    data, start = make_data(name), weights(make_model(name))
    if name == "llama":
        for sample in data:  # before 5.2 the Trainer counts the first label, which is never predicted
            sample["labels"][0] = -100
    stock, ours, other = (make_model(name) for _ in range(3))
    Trainer(stock, make_arguments(tmp_path, TrainingArguments), train_dataset=data).train()
    GradientDecayTrainer(ours, make_arguments(tmp_path), train_dataset=data).train()
    WAYS["subclass"](other, tmp_path, dict(beta=2.0), {}, train_dataset=data).train()
    assert distance(weights(ours), weights(stock), start) < 1e-6
    assert distance(weights(other), weights(stock), start) > 1e-3


def test_beta_per_class_reaches_the_loss(tmp_path):
    trainer = WAYS["subclass"](make_model("bert"), tmp_path, dict(beta=[1, 2, 3, 4, 5]), {})
    assert trainer.compute_loss_func.loss.beta.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(trainer.compute_loss_func.loss.beta) == CLASSES
