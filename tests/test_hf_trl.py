"""The mixin and the loss object in TRL's SFTTrainer, whose compute_loss calls the Trainer's."""

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from gd_plugin import GradientDecayConfig
from gd_plugin.hf import GradientDecayCallback, GradientDecayLossFunc, GradientDecayMixin

WORDS = ["<pad>", "<unk>", "</s>", *(f"w{i}" for i in range(40))]
# The prompt is not learnt: an older Trainer counts a first label that is never predicted.
DATA = {
    "prompt": ["w1 w2 "] * 32,
    "completion": [" ".join(f"w{i * j % 40}" for j in range(1, 5 + i % 7)) for i in range(32)],
}


class GradientDecaySFTTrainer(GradientDecayMixin, SFTTrainer):
    pass


def train(*args, **kwargs):
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), trainer.state.log_history


def make_trainer(trainer_class, folder, batch=8, accumulation=1, saves="no", **kwargs):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    args = SFTConfig(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, report_to="none",
        num_train_epochs=1, logging_steps=1, learning_rate=0.01, max_grad_norm=0.0, optim="sgd", bf16=False,
        use_cpu=True, save_strategy=saves, eval_strategy="epoch", disable_tqdm=True,
        loss_type="nll",  # the one that keeps the logits
    )  # fmt: skip
    data = Dataset.from_dict(DATA)
    return trainer_class(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **kwargs
    )


def test_sft_trainer(tmp_path):
    stock, _ = train(SFTTrainer, tmp_path / "stock")
    same, _ = train(GradientDecaySFTTrainer, tmp_path / "same", gd_config=GradientDecayConfig())
    beta_5 = GradientDecayConfig(beta=5.0)
    mixed, log = train(GradientDecaySFTTrainer, tmp_path / "mixed", gd_config=beta_5)
    split, _ = train(GradientDecaySFTTrainer, tmp_path / "split", batch=2, accumulation=4, gd_config=beta_5)
    loss = GradientDecayLossFunc(beta_5)
    called, _ = train(SFTTrainer, tmp_path / "called", compute_loss_func=loss, callbacks=[GradientDecayCallback(loss)])

    size = stock.norm()
    assert (same - stock).norm() < 1e-6 * size
    assert (split - mixed).norm() < 1e-6 * size
    assert (called - mixed).norm() < 1e-6 * size
    assert (mixed - stock).norm() > 1e-5 * size  # beta = 5 is another training
    entry = next(entry for entry in log if "loss" in entry)
    assert entry["gd_beta"] == 5.0 and 0 < entry["cross_entropy"] < entry["loss"]
    evaluated = next(entry for entry in log if "eval_loss" in entry)
    assert evaluated["eval_loss"] == pytest.approx(entry["cross_entropy"], rel=0.1)


def test_a_trainer_that_writes_a_card_with_every_checkpoint_writes_ours(tmp_path):
    config = GradientDecayConfig(beta=5.0)
    trainer = make_trainer(GradientDecaySFTTrainer, tmp_path / "sft", saves="epoch", gd_config=config)
    trainer.train()
    card = ModelCard.load(tmp_path / "sft/README.md")
    assert "beta is 5.0 throughout" in card.text and card.data.pipeline_tag == "text-generation"
    trainer.create_model_card(model_name="mine", dataset_name="me/text")
    assert ModelCard.load(tmp_path / "sft/README.md").data.datasets == ["me/text"]
