"""Tiny models of transformers, and data they can be trained on, for the tests of `gd_plugin.hf`."""

import atexit
import gc

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from gd_plugin.config import GradientDecayConfig
from gd_plugin.hf import (
    GradientDecayCallback,
    GradientDecayLossFunc,
    GradientDecayMixin,
    GradientDecayTrainer,
    GradientDecayTrainingArguments,
)

# Models this small lose time by a second thread, and `Trainer.train` collects garbage: 0.4 s for all that is imported.
torch.set_num_threads(1)
gc.freeze()
atexit.register(gc.unfreeze)

VOCABULARY, LENGTH, CLASSES = 32, 8, 5

_TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    pad_token_id=0,
)
_NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_MODERNBERT_NO_DROPOUT = dict(attention_dropout=0.0, mlp_dropout=0.0, embedding_dropout=0.0, classifier_dropout=0.0)

# name: (model class, configuration class, sizes). No dropout, so that batches may be cut as a test likes.
MODELS = {
    "bert": (BertForSequenceClassification, BertConfig, _TEXT | _NO_DROPOUT),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, _TEXT | _NO_DROPOUT),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig,
        dict(
            vocab_size=VOCABULARY,
            dim=16,
            hidden_dim=32,
            n_layers=1,
            n_heads=2,
            max_position_embeddings=16,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        ),
    ),
    "modernbert": (
        ModernBertForSequenceClassification,
        ModernBertConfig,
        _TEXT | _MODERNBERT_NO_DROPOUT | dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig,
        dict(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            **_NO_DROPOUT,
        ),
    ),
    "timm": (TimmWrapperForImageClassification, TimmWrapperConfig, dict(architecture="test_vit")),
    "wav2vec2": (
        Wav2Vec2ForSequenceClassification,
        Wav2Vec2Config,
        dict(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_stride=(4, 4),
            conv_kernel=(8, 8),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
            mask_time_prob=0.0,
        ),
    ),
    "tokens": (BertForTokenClassification, BertConfig, _TEXT | _NO_DROPOUT),
    "choices": (BertForMultipleChoice, BertConfig, _TEXT | _NO_DROPOUT),
    "masked": (BertForMaskedLM, BertConfig, _TEXT | _NO_DROPOUT),
    "llama": (LlamaForCausalLM, LlamaConfig, _TEXT),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        dict(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config,
        dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0),
    ),
    "bart": (
        BartForConditionalGeneration,
        BartConfig,
        dict(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=16,
            dropout=0.0,
        ),
    ),
}
LANGUAGE_MODELS = ("masked", "llama", "gpt2", "t5", "bart")


_NAMES = ("accuracy", "nll", "brier", "ece", "adaptive_ece", "classwise_ece", "mce", "confidence_gap")
METRICS = {f"eval_{name}" for name in _NAMES}


def make_model(name, seed=0, **config):
    """A model of `MODELS`, or the `TupleClassifier`; the same weights for the same seed."""
    torch.manual_seed(seed)
    if name == "custom":
        return TupleClassifier(**config)
    model_class, config_class, sizes = MODELS[name]
    if name not in (*LANGUAGE_MODELS, "choices"):
        config = {"num_labels": CLASSES} | config
    return model_class(config_class(**(sizes | config)))


class TupleClassifier(nn.Module):
    """A classifier without configuration, whose forward takes ``x`` only and returns a tuple (or the logits alone)."""

    def __init__(self, as_tuple=True):
        super().__init__()
        self.as_tuple = as_tuple
        self.hidden = nn.Linear(6, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        logits = self.head(self.hidden(x).tanh())
        return (logits, x) if self.as_tuple else logits


def make_data(name, n=16, seed=0, soft=False):
    """``n`` samples for a model of `MODELS`; labels are a function of the inputs, so that there is something to learn.

    Labels per token are ignored (-100) at the beginning of each sequence, in an unequal number of positions.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (n, LENGTH), generator=generator)
    tokens[:, -1] = 2  # the end of the sequence, which BART's classifiers and T5's decoder look for
    classes = tokens[:, 1] % CLASSES
    if name in ("vit", "timm"):
        side = 8 if name == "vit" else 160
        columns = {"pixel_values": torch.randn(n, 3, side, side, generator=generator)}
    elif name == "wav2vec2":
        columns = {"input_values": torch.randn(n, 400, generator=generator)}
    elif name == "custom":
        columns = {"x": torch.randn(n, 6, generator=generator)}
    elif name == "choices":
        columns = {"input_ids": torch.stack([tokens.roll(i, 0) for i in range(4)], 1)}
        classes = tokens[:, 1] % 4
    else:
        columns = {"input_ids": tokens}
    if name in ("tokens", *LANGUAGE_MODELS):
        labels = tokens % CLASSES if name == "tokens" else tokens
        ignored = torch.arange(LENGTH) < (torch.arange(n) * 5 % 7)[:, None]
        classes = labels.masked_fill(ignored, -100)
    if name in ("t5", "bart"):
        columns["decoder_input_ids"] = torch.cat([torch.ones(n, 1, dtype=torch.long), tokens[:, :-1]], 1)
    if soft:
        classes = torch.randn(n, CLASSES, generator=generator).mul(3).softmax(-1)
    columns["target" if name == "custom" else "labels"] = classes
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def as_batch(samples):
    return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


def make_arguments(path, kind=GradientDecayTrainingArguments, **kwargs):
    """Training arguments with the defaults of these tests.

    Adam would blow up rounding where a gradient is 0, and clipping would hide a loss that is four times too large.
    """
    defaults = dict(
        output_dir=str(path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=3,
        optim="sgd",
        learning_rate=0.2,
        max_grad_norm=1e9,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
    )
    if "num_train_epochs" in kwargs:
        defaults["max_steps"] = -1
    return kind(**(defaults | kwargs))


class OwnTrainer(Trainer):
    """What a user may have: a Trainer with something changed."""

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "own": 1.0}, *args, **kwargs)


class MixedTrainer(GradientDecayMixin, OwnTrainer):
    pass


class MeanOfMeans(GradientDecayTrainer):
    """Wrong where micro-batches weigh unequally: every one of them is divided by its own labels."""

    @property
    def accumulation(self):
        return self.args.gradient_accumulation_steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:  # evaluation
            return super().compute_loss(model, inputs, return_outputs)
        return super().compute_loss(model, inputs) / self.accumulation


class SumOfMeans(MeanOfMeans):
    """Wrong everywhere, and what the heads of the BERT family do in the Trainer (transformers#47688)."""

    accumulation = 1


def _by_subclass(model, path, gd, arguments, kind=GradientDecayTrainer, **kwargs):
    arguments = make_arguments(path, **arguments, **{f"gd_{key}": value for key, value in gd.items()})
    return kind(model, arguments, **kwargs)


def _by_mixin(model, path, gd, arguments, **kwargs):
    arguments = make_arguments(path, TrainingArguments, **arguments)
    return MixedTrainer(model, arguments, gd_config=GradientDecayConfig(**gd), **kwargs)


def _by_callback(model, path, gd, arguments, callback=GradientDecayCallback, callbacks=(), **kwargs):
    loss = GradientDecayLossFunc(GradientDecayConfig(**gd))
    arguments = make_arguments(path, TrainingArguments, **arguments)
    return Trainer(model, arguments, compute_loss_func=loss, callbacks=[callback(loss), *callbacks], **kwargs)


# way: function(model, output directory, gradient-decay knobs, training arguments, **kwargs of the Trainer)
WAYS = {"subclass": _by_subclass, "mixin": _by_mixin, "callback": _by_callback}


def bound_loss(model, path, **gd):
    """A loss function that knows its model, as its callback leaves it before the first update."""
    loss = GradientDecayLossFunc(GradientDecayConfig(**gd))
    loss.bind(model, make_arguments(path))
    return loss


def weights(model):
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def distance(a, b, start):
    """How far two trained weight vectors are apart, in units of what the training changed."""
    return ((a - b).norm() / (b - start).norm()).item()


def train_logs(trainer, *keys):
    """The values of ``keys`` at every logging step of the training."""
    return [[entry[key] for key in keys] for entry in trainer.state.log_history if "loss" in entry]
