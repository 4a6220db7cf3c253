"""What the tests of the command share. No test needs the network, and none leaves anything in the user's caches."""

import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
from typing import NamedTuple

import pytest

# Before the first import of torch, transformers or datasets, which read them once. One thread: the tensors are tiny,
# and child processes with another number of threads would add them up in another order.
_cache = tempfile.TemporaryDirectory(prefix="gd_plugin_tests_")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": _cache.name, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}

# An untrained network of 100,000 weights on 32 pixels: an update takes 0.05 s.
SMALL = (
    "--model timm:test_efficientnet --image_size 32 --max_train_samples 128 --max_eval_samples 64 "
    "--per_device_train_batch_size 32 --per_device_eval_batch_size 64 --num_train_epochs 1 --logging_strategy steps "
    "--logging_steps 1 "
    "--learning_rate 0.01 --use_cpu true --seed 0"
).split()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="kill a training twenty times, in place of three")


def pytest_collection_modifyitems(items):
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no GPU here; on a machine with one: pytest -m gpu"))


def pytest_terminal_summary(terminalreporter):
    passed = terminalreporter.getreports("passed")
    if figures := [value for report in passed for name, value in report.user_properties if name == "figure"]:
        terminalreporter.section("figures")
        width = max(len(name) for name, _ in figures)
        for name, value in sorted(set(map(tuple, figures))):
            terminalreporter.write_line(f"{name:{width}}  {value}")


@pytest.fixture
def figure(record_property):
    """What was measured by a test, to be shown at the end of them all: ``figure("kills", 20)``."""
    return lambda name, value: record_property("figure", (name, f"{value:.1e}" if type(value) is float else str(value)))


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def command():
    """`gd-plugin` in this process: words in, exit code and what was printed out."""
    from gd_plugin.cli import main

    def run(*argv) -> Outcome:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = main([str(word) for word in argv])
            except SystemExit as error:  # argparse, after --help
                code = error.code
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def train(command):
    """A training that must succeed: what it printed."""

    def run(*argv, output_dir) -> str:
        outcome = command("train", *argv, "--output_dir", output_dir)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    return run


@pytest.fixture(scope="session")
def start():
    """`gd-plugin` in a process of its own, without the imports that would take it ten seconds: it is forked from one
    that has them, and has computed nothing. ``missing``: a package that it cannot import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gd_plugin.train", "sklearn.datasets", "timm"])

    def run(argv, stderr, missing=None) -> multiprocessing.Process:
        process = context.Process(target=_in_a_process, args=([str(word) for word in argv], stderr, missing))
        process.start()
        return process

    return run


def _in_a_process(argv, stderr, missing):
    os.setsid()  # a process group of its own, as a shell makes one for what Ctrl-C is to end
    with open(stderr, "w") as file:
        os.dup2(file.fileno(), 2)
    if missing:
        for name in [name for name in sys.modules if name.split(".")[0] in (missing, "gd_plugin")]:
            del sys.modules[name]
        sys.modules[missing] = None
    from gd_plugin.cli import main

    sys.exit(main(argv))


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(scope="module")
def one_thread():
    """Where the tensors are tiny: on a busy machine threads waiting for each other take three times as long as the
    work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def learns():
    """To be given after `small`, where the model is to know something."""
    return ["--max_train_samples", "512", "--num_train_epochs", "4"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A folder with an untrained BERT of two layers and its tokenizer, which does not say how much BERT can read."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

    words = "[PAD] [UNK] [CLS] [SEP] good fine great bad poor awful film book play song".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    folder = tmp_path_factory.mktemp("bert")
    set_seed(0)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """A folder with an untrained ViT of two layers for 3 classes, and its image processor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    folder = tmp_path_factory.mktemp("vit")
    set_seed(0)
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def poisoned_memory():
    """Whatever torch allocates without filling it holds NaN: an element that is never written shows."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # and with it `fill_uninitialized_memory`
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()  # or nothing is poisoned
    yield
    torch.use_deterministic_algorithms(before)
