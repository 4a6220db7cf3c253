"""What a training step costs with `GradientDecayTrainer` and a warm-up, beside the Trainer with its cross-entropy."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from .hf import GradientDecayTrainer, GradientDecayTrainingArguments

__all__ = ["STEPS", "measure_step", "step_of_language_model"]

_BLOCK = 4  # steps of one Trainer before it is the other's turn
_CLASSES = 100


class _Random(Dataset):
    """Samples that cost nothing to load."""

    def __init__(self, sample: dict) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict:
        return {**self.sample, "labels": index % _CLASSES}


def _resnet() -> tuple[torch.nn.Module, dict, int]:
    sizes = dict(embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic")
    model = ResNetForImageClassification(ResNetConfig(num_labels=_CLASSES, **sizes))
    return model, {"pixel_values": torch.randn(3, 64, 64)}, 32


def _bert() -> tuple[torch.nn.Module, dict, int]:
    sizes = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    model = BertForSequenceClassification(BertConfig(num_labels=_CLASSES, vocab_size=1000, **sizes))
    return model, {"input_ids": torch.arange(64), "attention_mask": torch.ones(64, dtype=torch.int64)}, 16


STEPS: dict[str, Callable] = {"ResNet": _resnet, "BERT": _bert}


class _Turns(TrainerCallback):
    """Lets two Trainers in two threads work in turns, a block of steps each, and times the blocks."""

    def __init__(self, mine: threading.Semaphore, others: threading.Semaphore, device: str) -> None:
        self.mine, self.others, self.device = mine, others, device
        self.blocks: list[float] = []
        self._start = 0.0

    def _now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *args, **kwargs):
        self.mine.acquire()
        self._start = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % _BLOCK == 0:
            self.blocks.append((self._now() - self._start) / _BLOCK)
            self.others.release()
            if state.global_step < state.max_steps:
                self.mine.acquire()
                self._start = self._now()


def measure_step(name: str, rounds: int, device: str) -> dict:
    """Seconds per step of both, block by block, the first two blocks of each left out as warm-up.

    Both are real trainings of the same model in this process, which take turns.
    """
    mine, others = threading.Semaphore(1), threading.Semaphore(0)
    blocks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = dict(
            output_dir=folder, max_steps=_BLOCK * (rounds + 2), report_to="none", save_strategy="no", disable_tqdm=True,
            logging_strategy="no", use_cpu=device == "cpu", seed=0,
        )  # fmt: skip
        trainers = []
        for kind in ("trainer", "gradient-decay"):
            set_seed(0)
            model, sample, batch = STEPS[name]()
            turns = _Turns(mine, others, device) if kind == "trainer" else _Turns(others, mine, device)
            if kind == "trainer":
                cls, args = Trainer, TrainingArguments(per_device_train_batch_size=batch, **options)
            else:
                schedule = dict(gd_beta=5.0, gd_beta_start=0.01, gd_warmup_ratio=1.0)
                cls = GradientDecayTrainer
                args = GradientDecayTrainingArguments(per_device_train_batch_size=batch, **schedule, **options)
            trainers.append(cls(model, args, train_dataset=_Random(sample), callbacks=[turns]))
            blocks[kind] = turns.blocks
        threads = [threading.Thread(target=trainer.train) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = {kind: seconds[2:] for kind, seconds in blocks.items()}
    if any(len(seconds) != rounds for seconds in found.values()):
        raise RuntimeError(f"a training of {name} came to its end too early")
    parameters = sum(p.numel() for p in trainers[0].model.parameters())
    milliseconds = 1e3 * statistics.median(found["trainer"])
    return {"model": name, "parameters": parameters, "batch": batch, "ms": milliseconds, **found}


def step_of_language_model(
    kind: str, tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str
) -> Callable[[], None]:
    """Forward and backward of a Llama of two layers as a Trainer makes them, of two sequences, without the optimizer.

    Args:
        kind: ``"Trainer"``, ``"GradientDecayTrainer"`` or ``"gd_fused_linear"``, which is the latter with that flag.
    """
    set_seed(0)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=tokens, pad_token_id=0, **sizes)
    model = LlamaForCausalLM(config).to(device, dtype)
    options = dict(output_dir=tempfile.gettempdir(), report_to="none", use_cpu=device == "cpu", disable_tqdm=True)
    if kind == "Trainer":
        trainer = Trainer(model, TrainingArguments(**options))
    else:
        fused = kind == "gd_fused_linear"
        trainer = GradientDecayTrainer(
            model, GradientDecayTrainingArguments(gd_beta=5.0, gd_fused_linear=fused, **options)
        )
    ids = torch.randint(vocabulary, (2, tokens // 2), device=device)

    def step() -> None:
        model.zero_grad()
        trainer.compute_loss(model, {"input_ids": ids, "labels": ids}).backward()

    return step
