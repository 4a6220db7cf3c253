"""The same updates in one, two and four processes, with and without accumulation, and in half precision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import many_processes
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from hf_models import distance, make_arguments, make_data, make_model, train_logs, weights
from many_processes import CASES, CONTROLS, RECIPES, UPDATES, Tagger, launch_environment, loop, token_data
from safetensors.torch import load_file
from transformers import BertForTokenClassification, TrainerCallback

from gd_plugin import GradientDecayConfig, GradientDecayLoss, beta_at, gradient_decay_cross_entropy
from gd_plugin.hf import GradientDecayTrainer
from gd_plugin.record import hardware

ACCELERATE_ON_CPU = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "cpu.yaml")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
WORLDS = (1, 2, 4)


def start(launcher, folder):
    return subprocess.Popen(
        [*launcher, many_processes.__file__, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"ACCELERATE_USE_CPU": "1"},
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What `many_processes.main` left with each number of processes; two by Accelerate's launcher, four by torch's."""
    folders = {world: tmp_path_factory.mktemp(f"world{world}") for world in WORLDS}
    processes = {2: start(ACCELERATE_ON_CPU, folders[2]), 4: start(TORCHRUN, folders[4])}
    try:
        many_processes.main(folders[1])
        for world, process in processes.items():
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output[-4000:]
            (folders[world] / "output").write_text(output)
    finally:
        for process in processes.values():
            process.terminate()  # a launcher, which ends what it has started
    return folders


@pytest.fixture(scope="module")
def results(folders):
    return {world: torch.load(folder / "results.pt") for world, folder in folders.items()}


def change(result, reference):
    """How far the weights are from the reference's, in units of what its training changed."""
    return distance(result["end"], reference["end"], reference["start"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_updates_however_they_are_split(case, results, figure):
    way, samples, accumulation = case
    reference = results[1][way, samples, 1]  # one process, one batch
    differences = [change(results[world][case], reference) for world in WORLDS]
    assert max(differences) < 1e-6
    figure(f"{way}, {samples} samples, accumulation {accumulation}, 1, 2 and 4 processes: difference", max(differences))
    for world in WORLDS:
        result = results[world][case]
        # Every process was given every beta, and the first and the last are those of the configuration.
        assert len(result["betas"]) == world
        assert all(betas == reference["betas"][0] for betas in result["betas"])
        assert {0.1, 1.0} < set(result["betas"][0])


@pytest.mark.parametrize("case", CONTROLS, ids=str)
def test_the_mean_of_means_is_another_update(case, results, figure):
    way, samples, accumulation = case
    reference = results[1][way.split(",")[0], samples, 1]
    differences = [change(results[world][case], reference) for world in WORLDS]
    assert min(differences) > 1e-2
    figure(f"control: {way}, {samples} samples, accumulation {accumulation}: smallest difference", min(differences))


@pytest.mark.parametrize("world", [2, 4])
def test_beta_is_the_same_where_epochs_are_not(world, results):
    """A warm-up of 5.5 epochs; with the length of its own epochs a process would come to its end earlier."""
    result = results[world]["epochs of different length"]
    assert result["batches"] == ([3, 2] if world == 2 else [3, 2, 2, 2])
    config = GradientDecayConfig(**many_processes.GD).resolve(UPDATES, 3)
    expected = pytest.approx([beta_at(config, update / UPDATES) for update in range(UPDATES)], rel=1e-6)
    assert len(result["betas"]) == world and all(betas == expected for betas in result["betas"])
    wrong = GradientDecayConfig(**many_processes.GD).resolve(UPDATES, 2)
    assert [beta_at(wrong, update / UPDATES) for update in range(UPDATES)] != expected


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("what", ["sharded logits", "tensor-parallel head"])
def test_logits_whose_classes_are_spread_over_processes(what, world, results, figure):
    errors = results[world][what]
    assert len(errors) > 2 and max(errors.values()) < 1e-6, errors
    figure(f"{what}, {world} processes: difference", max(errors.values()))
    no_such_class, second_derivative = results[world]["refused"]
    assert "index 10 is out of bounds" in no_such_class
    assert "not differentiable twice" in second_derivative


def test_an_fsdp2_checkpoint_loads_in_one_process(folders, results, figure):
    """Of the Trainer and of the loop: whole models, and those that one process would have trained."""
    model = BertForTokenClassification.from_pretrained(folders[2] / "fsdp2_trainer")
    difference = change({"end": weights(model)}, results[1]["Trainer", 63, 1])
    model = Tagger()
    model.load_state_dict(load_file(folders[2] / "fsdp2_loop/model.safetensors"))
    difference = max(difference, change({"end": weights(model)}, results[1]["loop", 34, 1]))
    assert difference < 1e-6
    figure("FSDP2, 2 processes: difference", difference)


def test_a_loss_inside_a_sharded_head_is_that_of_the_logits(folders, results):
    plain, fused = torch.load(folders[2] / "fsdp2_fused.pt")
    assert len(plain) == 4 and plain[0] != pytest.approx(plain[-1], rel=1e-2)
    for one, two in zip(plain, fused, strict=True):
        assert two == pytest.approx(one, rel=1e-5)


# Configurations and launchers -----------------------------------------------------------------------------------------


def test_the_command_and_the_loop_under_accelerate_launch(folders, tmp_path, monkeypatch):
    assert (folders[2] / "output").read_text().count("Models, records and pictures") == 1  # the first process prints
    record = json.loads((folders[2] / "train/record.json").read_text())
    assert max(entry["step"] for entry in record["log"]) == 2  # 128 samples, 32 for each of two processes
    assert record["hardware"]["processes"] == 2 and hardware(record).endswith(", 2 processes")

    monkeypatch.chdir(tmp_path)
    loop.main()
    one, two = (load_file(folder / "runs/accelerate_loop/model.safetensors") for folder in (tmp_path, folders[2]))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


# name: (how many processes, what Accelerate tells them)
CONFIGURATIONS = {
    "one_gpu.yaml": (1, {}),
    "ddp.yaml": (2, {}),
    "cpu.yaml": (2, {}),
    "fsdp2.yaml": (2, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}),
    "zero2.yaml": (2, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    "zero3.yaml": (2, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
}


def test_every_configuration_is_tested():
    assert {path.name for path in RECIPES.glob("*.yaml")} == set(CONFIGURATIONS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_accelerate_reads_the_configuration(name, monkeypatch):
    """By its own loader, as ``accelerate launch`` does it; and so do its plug-ins what they are told."""
    processes, expected = CONFIGURATIONS[name]
    args, environment = launch_environment(name)
    assert args.num_processes == processes
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.items() >= expected.items()
    if processes > 1:
        assert launch_environment(name, "--num_processes", "8")[0].num_processes == 8
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if "fsdp" in name:
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    if "zero" in name:
        config = DeepSpeedPlugin().deepspeed_config
        assert config["zero_optimization"]["stage"] == int(name[4])
        assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"


# Half precision -------------------------------------------------------------------------------------------------------


def textbook(logits, labels, beta):
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")[labels != -100]
    return (cross_entropy + (1 + (beta - 1) * torch.exp(-cross_entropy)).log()).mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
def test_half_precision_trains_within_the_error_of_its_dtype(pure, dtype, figure):
    """At every update of a warm-up: no farther from fp64 on the same logits than the textbook's loss in that dtype."""
    model = Tagger().to(dtype) if pure else Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = GradientDecayConfig(beta=1.0, beta_start=0.01, warmup_ratio=0.8)
    criterion = GradientDecayLoss.from_config(config)
    tokens, labels = token_data(32).tensors
    cross_entropies, worst, worst_textbook = [], 0.0, 0.0
    for update in range(40):
        criterion.set_beta(beta_at(config, update / 40))
        with torch.autocast("cpu", dtype, enabled=not pure):
            logits = model(tokens)
            loss = criterion(logits, labels)
        assert logits.dtype == dtype and loss.dtype == torch.float32
        given, beta = logits.detach(), criterion.beta.double()
        exact = gradient_decay_cross_entropy(given.double(), labels, beta)
        error, of_textbook = (
            (x.double() - exact).abs() for x in (loss.detach(), textbook(given, labels, beta.to(dtype)))
        )
        assert error <= of_textbook + 1e-6 * exact.abs()
        worst, worst_textbook = max(worst, error.item()), max(worst_textbook, of_textbook.item())
        cross_entropies.append(F.cross_entropy(given.float(), labels).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert cross_entropies[-1] < 0.7 * cross_entropies[0]
    assert worst_textbook > 100 * worst  # the bound says something
    figure(f"{dtype}{', pure' if pure else ', autocast'}: error of the loss", worst)
    figure(f"control: {dtype}{', pure' if pure else ', autocast'}: error of the textbook's loss", worst_textbook)


def test_beta_advances_where_fp16_skips_an_update(tmp_path):
    """A scale that overflows during the warm-up: ``global_step`` counts what was skipped, and beta follows it."""
    betas, skipped, start = [], [], {}

    class Fp16(GradientDecayTrainer):
        """Accelerate has no fp16 on the CPU."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

        def compute_loss(self, *args, **kwargs):
            betas.append(self.compute_loss_func.loss.beta.item())
            with torch.autocast("cpu", torch.float16):
                return super().compute_loss(*args, **kwargs)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            skipped.append(trainer.accelerator.optimizer_step_was_skipped)
            start.setdefault("after one", weights(model))

    gd = dict(gd_beta=1.0, gd_beta_start=0.01, gd_warmup_ratio=0.8)
    arguments = make_arguments(tmp_path, max_steps=UPDATES, max_grad_norm=0.0, **gd)
    trainer = Fp16(make_model("tokens"), arguments, train_dataset=make_data("tokens"), callbacks=[Watch()])
    before = weights(trainer.model)
    trainer.train()

    assert skipped[0] and 0 < sum(skipped) < UPDATES // 2
    assert torch.equal(start["after one"], before)
    assert weights(trainer.model).isfinite().all() and not torch.equal(weights(trainer.model), before)
    assert trainer.state.global_step == len(betas) == UPDATES
    expected = [beta_at(arguments.gd_config, update / UPDATES) for update in range(UPDATES)]
    assert betas == pytest.approx(expected, rel=1e-6)
    assert torch.tensor(train_logs(trainer, "loss", "cross_entropy")).isfinite().all()
