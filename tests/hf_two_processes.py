"""Trains and saves the weights and logs. `test_hf_two_processes.py` runs it with two processes, and alone:

python -m torch.distributed.run --nproc-per-node 2 hf_two_processes.py OUTPUT_DIR
"""

import os
import sys
from pathlib import Path

import torch
from hf_models import CLASSES, METRICS, VOCABULARY, WAYS, MeanOfMeans, make_data, make_model, train_logs, weights

from gd_plugin.hf import GradientDecayTrainer

# Labels are ignored in unequal numbers, so the two halves of a batch of 8 never weigh the same.
SCENARIOS = {
    "tokens": ("tokens", dict(beta=0.1)),
    "tokens, class weights": ("tokens", dict(beta=0.1, class_weights=[0.1, 3.0, 1.0, 0.5, 2.0])),
    "llama": ("llama", dict(beta=5.0, beta_start=0.1, warmup_steps=2)),
    "llama, fused": ("llama", dict(beta=5.0, beta_start=0.1, warmup_steps=2, fused_linear=True)),
    "gpt2, class weights, fused": (
        "gpt2",
        dict(beta=0.1, class_weights=[0.1, 3.0] * (VOCABULARY // 2), fused_linear=True),
    ),
    "gpt2, class weights": ("gpt2", dict(beta=0.1, class_weights=[0.1, 3.0] * (VOCABULARY // 2))),
    "bert, class weights": ("bert", dict(beta=0.1, class_weights=[0.1] + [2.0] * (CLASSES - 1))),
}
KINDS = {"ours": GradientDecayTrainer, "mean of means": MeanOfMeans}


def main(path):
    world = int(os.environ.get("WORLD_SIZE", 1))
    results = {}
    for scenario, (name, gd) in SCENARIOS.items():
        for kind_name, kind in KINDS.items():
            model = make_model(name)
            sizes = dict(per_device_train_batch_size=8 // world, per_device_eval_batch_size=8 // world)
            data = make_data(name, 24)
            trainer = WAYS["subclass"](
                model, path, gd, sizes, kind=kind, train_dataset=data, eval_dataset=make_data(name, 21, seed=1)
            )
            start = weights(model)
            trainer.train()
            results[scenario, kind_name] = {
                "start": start,
                "end": weights(model),
                "logs": train_logs(trainer, "loss", "cross_entropy", "gd_beta"),
                "metrics": {k: v for k, v in trainer.evaluate().items() if k in METRICS},
            }
    if trainer.is_world_process_zero():
        torch.save(results, Path(path) / "results.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    # Ended in order: a process that is gone while gloo's threads of the other still run makes that one abort.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
