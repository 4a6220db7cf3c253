"""The three ways into the Trainer: each trains with a warm-up, resumes in its middle, and saves an ordinary model."""

import math

import pytest
import torch
from hf_models import WAYS, as_batch, make_data, make_model, train_logs, weights
from transformers import BertForSequenceClassification, TrainerCallback

from gd_plugin.config import GradientDecayConfig
from gd_plugin.hf import GradientDecayCallback
from gd_plugin.schedule import beta_at

WARMUP = dict(beta=5.0, beta_start=0.01, warmup_steps=5)
SIX_UPDATES = dict(max_steps=6, learning_rate=0.05, optim="adamw_torch", lr_scheduler_type="linear")
DROPOUT = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


class RecordBeta(TrainerCallback):
    """The value of the loss's buffer at every update that was made, and how often it was set."""

    def __init__(self):
        self.betas = []

    def watch(self, trainer):
        self.loss = trainer.compute_loss_func.loss
        self.set_to, set_beta = [], self.loss.set_beta
        self.loss.set_beta = lambda beta: (self.set_to.append(beta), set_beta(beta))
        return trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.betas.append(self.loss.beta.tolist())


class RestartedSchedule(GradientDecayCallback):
    """Wrong: counts the updates of this process instead of those of the training."""

    updates = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss.loss.set_beta(beta_at(self._schedule, self.updates / state.max_steps))
        self.updates += 1


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A training of six updates in each of the three ways, with a checkpoint at every second one."""
    trainers = {}
    for way, build in WAYS.items():
        model = make_model("bert", **DROPOUT)
        arguments = SIX_UPDATES | dict(save_strategy="steps", save_steps=2)
        trainers[way] = build(
            model, tmp_path_factory.mktemp(way), WARMUP, arguments, train_dataset=make_data("bert", 20)
        )
        trainers[way].train()
    return trainers


@pytest.mark.parametrize("way", WAYS)
def test_resumes_bit_identically_in_the_middle_of_the_warmup(way, uninterrupted, tmp_path):
    whole = uninterrupted[way]
    # Another seed: everything must come from the checkpoint.
    resumed = WAYS[way](
        make_model("bert", 7, **DROPOUT), tmp_path, WARMUP, SIX_UPDATES, train_dataset=make_data("bert", 20)
    )
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")

    assert torch.equal(weights(resumed.model), weights(whole.model))
    keys = ("step", "loss", "gd_beta", "cross_entropy", "grad_norm", "learning_rate")
    assert train_logs(resumed, *keys) == train_logs(whole, *keys)
    assert len(train_logs(resumed, *keys)) == 6  # two of the checkpoint and four of its own


@pytest.mark.parametrize("way", WAYS)
def test_resumes_where_the_state_of_callbacks_is_restored(way, uninterrupted, tmp_path):
    """The Trainer then looks in the checkpoint for every callback that has a state; ours has none."""
    whole = uninterrupted[way]
    arguments = SIX_UPDATES | dict(restore_callback_states_from_checkpoint=True)
    resumed = WAYS[way](
        make_model("bert", 7, **DROPOUT), tmp_path, WARMUP, arguments, train_dataset=make_data("bert", 20)
    )
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.compute_loss_func.loss.beta.item() == 5.0


def test_the_resume_test_can_fail(uninterrupted, tmp_path):
    arguments = dict(callback=RestartedSchedule, train_dataset=make_data("bert", 20))
    resumed = WAYS["callback"](make_model("bert", 7, **DROPOUT), tmp_path, WARMUP, SIX_UPDATES, **arguments)
    resumed.train(resume_from_checkpoint=f"{uninterrupted['callback'].args.output_dir}/checkpoint-2")
    assert not torch.allclose(weights(resumed.model), weights(uninterrupted["callback"].model), atol=1e-3)


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_the_three_ways_bring_the_same_weights(way, uninterrupted):
    assert torch.equal(weights(uninterrupted[way].model), weights(uninterrupted["subclass"].model))
    keys = ("step", "loss", "gd_beta", "cross_entropy")
    assert train_logs(uninterrupted[way], *keys) == train_logs(uninterrupted["subclass"], *keys)


def test_the_users_own_trainer_stays_what_it_was(uninterrupted):
    assert train_logs(uninterrupted["mixin"], "own") == [[1.0]] * 6


@pytest.mark.parametrize("way", WAYS)
def test_saves_an_ordinary_model(way, uninterrupted, tmp_path):
    trainer, data = uninterrupted[way], make_data("bert", 11, seed=3)
    trainer.save_model(str(tmp_path))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert trainer.evaluate(data)["eval_loss"] > 0

    predicted = torch.from_numpy(trainer.predict(data).predictions)
    batches = [as_batch(data[:8])["input_ids"], as_batch(data[8:])["input_ids"]]  # the Trainer's, so that bits agree
    with torch.no_grad():
        assert torch.equal(torch.cat([loaded(ids).logits for ids in batches]), predicted)
        fresh = make_model("bert").eval()
        assert not torch.allclose(torch.cat([fresh(ids).logits for ids in batches]), predicted, atol=1e-3)


# 10 samples in batches of 2 are 5 micro-batches an epoch: 2 updates of 3 and 2 micro-batches.
UNEVEN = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3)
SCHEDULES = {
    "constant": (dict(beta=3.0), dict(max_steps=3), 3),
    "ratio": (dict(beta_start=0.01, warmup_ratio=0.5), dict(max_steps=6), 6),
    "ratio that ends between two updates": (dict(beta_start=0.01, warmup_ratio=0.4), dict(max_steps=6), 6),
    "the whole training": (dict(beta_start=0.01, warmup_ratio=1.0), dict(max_steps=4), 4),
    "geometric steps": (dict(beta_start=0.01, warmup_steps=3, schedule="geometric"), dict(max_steps=5), 5),
    "cosine epochs": (
        dict(beta_start=0.1, warmup_epochs=1.5, schedule="cosine"),
        dict(num_train_epochs=2.0, per_device_train_batch_size=5),
        4,
    ),
    "steps, uneven epochs": (dict(beta_start=0.01, warmup_steps=4), UNEVEN | dict(num_train_epochs=3.0), 6),
    "epochs, uneven epochs": (dict(beta_start=0.01, warmup_epochs=1.5), UNEVEN | dict(num_train_epochs=3.0), 6),
    "epochs, half an epoch at the end": (
        dict(beta_start=0.01, warmup_epochs=1.0),
        UNEVEN | dict(num_train_epochs=1.5),
        3,
    ),
    "epochs, max_steps": (dict(beta_start=0.01, warmup_epochs=1.0), UNEVEN | dict(max_steps=3), 3),
    "per class": (
        dict(beta=[1.0, 2.0, 3.0, 4.0, 5.0], beta_start=0.5, warmup_steps=2),
        dict(max_steps=3),
        3,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_beta_at_every_update(name, tmp_path):
    gd, arguments, updates = SCHEDULES[name]
    gd, record = {"beta": 5.0} | gd, RecordBeta()
    data = make_data("custom", 10)
    way = dict(train_dataset=data, callbacks=[record])
    arguments = arguments | dict(label_names=["target"], remove_unused_columns=False)
    trainer = record.watch(WAYS["subclass"](make_model("custom"), tmp_path, gd, arguments, **way))
    trainer.train()

    config = GradientDecayConfig(**gd)
    micro_batches = math.ceil(len(data) / trainer.args.per_device_train_batch_size)
    schedule = config.resolve(updates, math.ceil(micro_batches / trainer.args.gradient_accumulation_steps))
    expected = [beta_at(schedule, update / updates) for update in range(updates)]
    assert record.betas == torch.tensor(expected).tolist()
    logged = [beta if isinstance(beta, float) else sum(beta) / len(beta) for beta in expected]
    assert train_logs(trainer, "gd_beta") == [[beta] for beta in logged]

    # Set where it changes and never again after the warm-up.
    changes = [beta for i, beta in enumerate(expected) if i == 0 or beta != expected[i - 1]]
    assert record.set_to == changes
    warmup = math.ceil(schedule.warmup_ratio * updates)
    assert len(record.set_to) == min(warmup + 1, updates)
    if config.beta_start is not None:
        assert expected[0] != expected[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_second_training_begins_at_the_start_of_the_schedule(way, tmp_path):
    """With a new model each time, as in a hyperparameter search; the loss follows the model that is trained."""
    trainer = WAYS[way](
        None, tmp_path, WARMUP, SIX_UPDATES, model_init=lambda: make_model("bert"), train_dataset=make_data("bert")
    )
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append((weights(trainer.model), train_logs(trainer, "loss", "gd_beta", "cross_entropy")))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert ends[0][1][0][1] == 0.01


def test_epochs_need_a_data_set_with_a_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_data("bert", 16))

    trainer = WAYS["subclass"](
        make_model("bert"), tmp_path, dict(beta_start=0.1, warmup_steps=2), {}, train_dataset=Stream()
    )
    trainer.train()
    assert train_logs(trainer, "gd_beta") == [[0.1], [pytest.approx(0.55)], [1.0]]

    trainer = WAYS["subclass"](
        make_model("bert"), tmp_path, dict(beta_start=0.1, warmup_epochs=1.0), {}, train_dataset=Stream()
    )
    with pytest.raises(ValueError, match=r"^gd_warmup_epochs is 1.0 but the length of an epoch is unknown; use"):
        trainer.train()
    assert trainer.state.global_step == 0
