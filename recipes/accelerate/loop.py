"""A training loop with Accelerate and no Trainer: the gradient-decay loss on scikit-learn's handwritten digits.

    accelerate launch --config_file recipes/accelerate/one_gpu.yaml recipes/accelerate/loop.py

one_gpu.yaml works on the CPU too; for several GPUs ddp.yaml, fsdp2.yaml, zero2.yaml and zero3.yaml.

The loss of an update is the sum of the weighted losses of all its samples, in all micro-batches and on all processes,
divided by the sum of the weights of all their targets. So it is the same update however its samples are split. The mean
of the micro-batches' means is another one wherever these weigh differently: by class weights, by ignored targets, by a
short last batch (huggingface/accelerate#3193).
"""

import math
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gd_plugin import GradientDecayConfig, GradientDecayLoss, beta_at

IGNORED = -100  # label of a target that does not count


def target_weight(labels: Tensor, class_weights: Tensor | None) -> Tensor | int:
    """What a mean divides by: the sum of the weights of the targets that count, or their number without weights."""
    counted = labels[labels != IGNORED]
    return len(counted) if class_weights is None else class_weights[counted].sum()


def train(model: nn.Module, data: Dataset, config: GradientDecayConfig, epochs=12, batch=64, accumulation=4, lr=0.1):
    """Train; ``batch`` samples make an update, over all processes and ``accumulation`` micro-batches on each."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        # Counting is enough, since every update has as many micro-batches, the last ones of an epoch too: see `filler`.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        # The same order on every process, and no sample twice to fill up the last batch.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, even_batches=False),
    )
    if batch % (accumulation * accelerator.num_processes):
        raise ValueError(
            f"{batch} samples an update do not come out even over {accelerator.num_processes} processes and "
            f"{accumulation} micro-batches: choose another batch or accumulation"
        )
    loader = DataLoader(data, batch // (accumulation * accelerator.num_processes), shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr), loader)

    # From what every process knows: len(loader) differs between them where the batches do not come out even.
    updates_per_epoch = math.ceil(len(data) / batch)
    total_updates = epochs * updates_per_epoch
    config = config.resolve(total_updates, updates_per_epoch)
    criterion = GradientDecayLoss.from_config(config, ignore_index=IGNORED, reduction="sum").to(accelerator.device)

    # A micro-batch that counts for nothing, for who has run out of data: gradients are exchanged by all or by none.
    inputs, labels = (tensor.unsqueeze(0).to(accelerator.device) for tensor in data[0])
    filler = inputs, torch.full_like(labels, IGNORED)

    for epoch in range(epochs):
        loader.set_epoch(epoch)
        batches, epoch_loss = iter(loader), torch.zeros((), device=accelerator.device)
        for update in range(epoch * updates_per_epoch, (epoch + 1) * updates_per_epoch):
            criterion.set_beta(beta_at(config, update / total_updates))
            micro_batches = list(islice(batches, accumulation))
            weight = sum(target_weight(labels, criterion.weight) for _, labels in micro_batches)
            weight = accelerator.gather(torch.as_tensor(weight, device=accelerator.device).float()).sum()
            for inputs, labels in micro_batches + [filler] * (accumulation - len(micro_batches)):
                with accelerator.accumulate(model):
                    loss = criterion(model(inputs), labels) / weight
                    epoch_loss += loss.detach()
                    # Taken back: `backward` divides by the micro-batches, and gradients are averaged over processes.
                    accelerator.backward(loss * accumulation * accelerator.num_processes)
                    optimizer.step()
                    optimizer.zero_grad()
        epoch_loss = accelerator.reduce(epoch_loss).item() / updates_per_epoch
        accelerator.print(f"epoch {epoch + 1}: loss {epoch_loss:.4f}, last beta {criterion.beta.item():.3f}")
    return accelerator, model


def main() -> None:
    set_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    config = GradientDecayConfig(beta=1, beta_start=0.1, warmup_epochs=6, class_weights=[1, 2] * 5)
    accelerator, model = train(model, data, config)
    accelerator.save_model(model, "runs/accelerate_loop")
    accelerator.end_training()


if __name__ == "__main__":
    main()
