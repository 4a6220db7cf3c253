"""Trains and saves what came of it. `test_many_processes.py` runs it with two and four processes, and alone:

torchrun --nproc-per-node 4 many_processes.py OUTPUT_DIR
"""

import importlib.util
import itertools
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object, set_seed
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from hf_models import CLASSES, VOCABULARY, WAYS, MeanOfMeans, bound_loss, make_data, make_model, train_logs, weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from gd_plugin import GradientDecayConfig, GradientDecayLoss, cli, gradient_decay_cross_entropy
from gd_plugin.hf import GradientDecayTrainer

RECIPES = Path(__file__).parent.parent / "recipes/accelerate"
_spec = importlib.util.spec_from_file_location("accelerate_loop", RECIPES / "loop.py")
loop = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loop)

WORLD = int(os.environ.get("WORLD_SIZE", 1))
UPDATES, BATCH = 20, 32  # BATCH samples make an update, however many processes and micro-batches share them
LR = {"Trainer": 0.02, "loop": 0.1}  # so small that what is rounded does not grow
# Labels are ignored in unequal numbers, and weigh unequally.
GD = dict(beta=1.0, beta_start=0.1, warmup_epochs=5.5, class_weights=[0.1, 3.0, 1.0, 0.5, 2.0])

# Two updates an epoch. Of 63 samples the second has one less, and so has the last process's last micro-batch. Of 34 it
# has two, which are the first process's: the loop has something for the others, the Trainer would wait for them.
CASES = [("Trainer", 63, 1), ("Trainer", 63, 4), ("loop", 63, 1), ("loop", 63, 4), ("loop", 34, 1), ("loop", 34, 4)]
CONTROLS = [("Trainer, mean of means", 63, 4), ("loop, mean of means", 63, 4)]
# Samples that leave the processes with different numbers of batches: 3 and 2, or 3, 2, 2 and 2.
UNEVEN = {1: 63, 2: 16 * 5, 4: 8 * 9}


def make_trainer(path, samples, accumulation, kind=GradientDecayTrainer):
    arguments = dict(
        per_device_train_batch_size=BATCH // (accumulation * WORLD),
        gradient_accumulation_steps=accumulation,
        accelerator_config=dict(even_batches=False),  # no sample twice
        max_steps=UPDATES,
        learning_rate=LR["Trainer"],
        logging_steps=UPDATES,
    )
    data = make_data("tokens", samples)
    return WAYS["subclass"](make_model("tokens"), path, GD, arguments, kind=kind, train_dataset=data)


class Tagger(nn.Module):
    """Logits (N, C, length) of the tokens (N, length)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, CLASSES)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).tanh()).transpose(1, 2)


def token_data(samples):
    samples = make_data("tokens", samples)
    return TensorDataset(*(torch.stack([sample[key] for sample in samples]) for key in ("input_ids", "labels")))


def usual_loop(model, data, config, epochs, batch, accumulation, lr):
    """`loop.train` as it is usually written: a mean for every micro-batch, which Accelerate averages."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = True  # as by default
    loader = DataLoader(data, batch // (accumulation * WORLD), shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr), loader)
    config = config.resolve(UPDATES, UPDATES / epochs)
    criterion = GradientDecayLoss.from_config(config)
    update = 0
    for _ in range(epochs):
        for inputs, labels in loader:
            criterion.set_beta(loop.beta_at(config, update / UPDATES))
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model(inputs), labels))
                optimizer.step()
                optimizer.zero_grad()
            update += accelerator.sync_gradients
    return accelerator, model


def trained(path, way, samples, accumulation):
    """Weights before and after, and beta at every update, of every process."""
    betas, set_beta = [], GradientDecayLoss.set_beta
    GradientDecayLoss.set_beta = lambda self, beta: (betas.append(beta), set_beta(self, beta))[1]
    set_seed(0)
    try:
        if way.startswith("Trainer"):
            trainer = make_trainer(path, samples, accumulation, MeanOfMeans if "means" in way else GradientDecayTrainer)
            model, start = trainer.model, weights(trainer.model)
            trainer.train()
        else:
            model = Tagger()
            start = weights(model)
            train = usual_loop if "means" in way else loop.train
            train(model, token_data(samples), GradientDecayConfig(**GD), UPDATES // 2, BATCH, accumulation, LR["loop"])
    finally:
        GradientDecayLoss.set_beta = set_beta
    return {"start": start, "end": weights(model), "betas": gather_object([betas])}


def epochs_of_different_length(path):
    """beta at every update, and how many batches an epoch has, of every process."""
    betas = []

    class Recorded(GradientDecayTrainer):
        def training_step(self, *args, **kwargs):
            betas.append(self.compute_loss_func.loss.beta.item())
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(path, UNEVEN[WORLD], 1, Recorded)
    trainer.train()
    return {"betas": gather_object([betas]), "batches": gather_object([len(trainer.get_train_dataloader())])}


def sharded_logits():
    """Largest errors of the loss, the plain cross-entropy and the gradient, relative to those of all logits at once."""
    mesh, errors = init_device_mesh("cpu", (WORLD,)), {}
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(10, generator=generator) + 0.1
    variants = {
        "mean": {},
        "none": dict(reduction="none"),
        "sum, class weights": dict(reduction="sum", weight=weight),
        "mean, class weights": dict(weight=weight),
        "beta per class": dict(beta=weight),
        "label smoothing": dict(label_smoothing=0.1),
    }
    # In four processes 10 classes are 3, 3, 3 and 1; 9 leave nothing for the last one, and are gathered.
    shapes = {"(N, C)": (6, 10), "(N, C), 9": (6, 9), "(N, C, d)": (6, 10, 3), "(C)": (10,)}
    for (shape_name, shape), (name, knobs), dtype in itertools.product(
        shapes.items(), variants.items(), (torch.float32, torch.bfloat16)
    ):
        dim = 0 if len(shape) == 1 else 1
        logits = (20 * torch.randn(shape, generator=generator)).to(dtype)
        num_classes = shape[dim]
        target = torch.randint(num_classes, shape[:dim] + shape[dim + 1 :], generator=generator)
        if target.dim():
            target.view(-1)[1] = -100
        knobs = {"beta": 0.01} | {k: v[:num_classes] if v is weight else v for k, v in knobs.items()}
        for placement in (Shard(dim), Shard(0), Replicate()) if name == "mean" else (Shard(dim),):
            whole = logits.clone().requires_grad_()
            sharded = distribute_tensor(logits, mesh, [placement]).requires_grad_()
            results = []
            for z, labels in ((whole, target), (sharded, distribute_tensor(target, mesh, [Replicate()]))):
                loss, plain = gradient_decay_cross_entropy(z, labels, **knobs, return_cross_entropy=True)
                assert type(loss) is torch.Tensor
                loss.sum().backward()
                results.append((loss.detach(), plain, z.grad))
            assert sharded.grad.placements == (placement,)
            (*expected, gradient), (*got, sharded_gradient) = results
            pairs = [*zip(got, expected, strict=True), (sharded_gradient.full_tensor(), gradient)]
            key = f"{shape_name}, {name}, {dtype}".replace("torch.", "")
            error = max(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in pairs)
            errors[key] = max(errors.get(key, 0), error)
    return errors


def refused_sharded_logits():
    """What is said of a class that there is not, and of a second derivative."""
    logits = distribute_tensor(torch.randn(2, 10), init_device_mesh("cpu", (WORLD,)), [Shard(1)]).requires_grad_()
    messages = []
    for target, twice in (([0, 10], False), ([0, 9], True)):
        try:
            loss = gradient_decay_cross_entropy(logits, torch.tensor(target), 0.1)
            torch.autograd.grad(loss, logits, create_graph=twice)
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def tensor_parallel_head(path):
    """A head whose classes are spread over the processes: gradients of its weights and of what it is given, relative
    errors; by our loss, by the loss of the Trainer and, at beta = 1, by torch's own."""
    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(12, 8, generator=generator), torch.randint(10, (12,), generator=generator)
    losses = {
        "ours": (lambda z: gradient_decay_cross_entropy(z, target, 0.05),) * 2,
        "the Trainer's": (lambda z: bound_loss(nn.Linear(1, 1), path, beta=0.05)({"logits": z}, target, 12),) * 2,
        "torch's": (
            lambda z: gradient_decay_cross_entropy(z, target),
            lambda z: nn.functional.cross_entropy(z, target),
        ),
    }
    errors = {}
    for name, (of_whole, of_sharded) in losses.items():
        gradients = []
        for parallel in (False, True):
            torch.manual_seed(0)
            head, given = nn.Linear(8, 10), hidden.clone().requires_grad_()
            if parallel:
                head = parallelize_module(head, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
            with loss_parallel():
                (of_sharded if parallel else of_whole)(head(given)).backward()
            gradient = head.weight.grad
            gradients.append([given.grad, gradient.full_tensor() if parallel else gradient])
        errors[name] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*gradients, strict=True))
    return errors


def launch_environment(name, *flags):
    """What ``accelerate launch`` makes of a configuration file: its variables, without starting anything."""
    argv = ["--config_file", str(RECIPES / name), *flags, "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
    elif args.use_fsdp or args.multi_gpu:
        environment = prepare_multi_gpu_env(args)
    else:
        environment = prepare_simple_launcher_cmd_env(args)[1]
    return args, {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def fsdp2(path):
    """Trains under what fsdp2.yaml says, and saves one model by the Trainer, and one by the loop.

    Accelerate knows FSDP for GPUs only: it is told that the processes have one each. The devices stay CPUs.
    """

    def tell():
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    class Told(GradientDecayTrainer):
        def create_accelerator_and_postprocess(self):
            tell()
            super().create_accelerator_and_postprocess()
            assert self.is_fsdp_enabled and self.accelerator.is_fsdp2

    set_seed(0)
    # Accelerate shards the embeddings twice where they are among the blocks that the model names, as BERT's are.
    os.environ |= launch_environment("fsdp2.yaml", "--fsdp_transformer_layer_cls_to_wrap", "BertLayer")[1]
    trainer = make_trainer(path, 63, 4, Told)
    trainer.train()
    trainer.save_model(path / "fsdp2_trainer")

    # A language model's loss, of its logits and inside its head, whose weights are sharded.
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
    logs = []
    for fused in (False, True):
        gd = dict(beta=5.0, beta_start=0.1, warmup_steps=2, fused_linear=fused)
        sizes, data = dict(per_device_train_batch_size=4, max_steps=4), make_data("llama", 24)
        trainer = WAYS["subclass"](make_model("llama"), path, gd, sizes, kind=Told, train_dataset=data)
        trainer.train()
        logs.append(train_logs(trainer, "loss", "cross_entropy", "grad_norm"))
    if PartialState().is_main_process:
        torch.save(logs, path / "fsdp2_fused.pt")

    del os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"]
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    tell()
    set_seed(0)
    config = GradientDecayConfig(**GD)
    accelerator, model = loop.train(Tagger(), token_data(34), config, UPDATES // 2, BATCH, 4, LR["loop"])
    assert accelerator.is_fsdp2
    accelerator.save_model(model, path / "fsdp2_loop")


def commands(path):
    """What others start by itself: `gd-plugin train`, and the loop as a script, which ends the process group."""
    for name in launch_environment("fsdp2.yaml")[1]:
        os.environ.pop(name)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    words = (
        "train --dataset digits --model timm:test_efficientnet --image_size 32 --max_train_samples 128 --use_cpu true"
    )
    words += " --num_train_epochs 1 --per_device_train_batch_size 32 --logging_strategy steps --logging_steps 1"
    assert cli.main([*words.split(), "--output_dir", str(path / "train")]) == 0
    os.chdir(path)
    loop.main()


def main(path):
    results = {case: trained(path, *case) for case in (*CASES, *CONTROLS)}
    results["epochs of different length"] = epochs_of_different_length(path)
    if WORLD > 1:
        results["sharded logits"] = sharded_logits()
        results["refused"] = refused_sharded_logits()
        results["tensor-parallel head"] = tensor_parallel_head(path)
    if PartialState().is_main_process:
        torch.save(results, path / "results.pt")
    if WORLD == 2:
        fsdp2(path)
        commands(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
    # Ended in order: a process that is gone while gloo's threads of the other still run makes that one abort.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
