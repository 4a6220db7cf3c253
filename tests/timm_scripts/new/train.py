"""A small train.py in the shape of timm's since 1.0.31: a task has the criterion, an evaluator the validation metrics.

timm's own script is in no wheel. This one has its names, its order of steps and its arithmetic of updates, and of its
options those that the tests of `gd-plugin timm` use.
"""

import argparse
import importlib
import json
import logging
import os
from collections import OrderedDict
from contextlib import nullcontext, suppress
from functools import partial

import torch
import yaml
from timm import data, loss, models, optim, scheduler, utils
from timm import task as tasks

_logger = logging.getLogger("train")

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument("-c", "--config", default="", metavar="FILE")
parser = argparse.ArgumentParser(description="timm's training, in short")
OPTIONS = {
    str: "data_dir dataset= train_split=train val_split=validation model=test_vit sched=cosine opt=sgd resume output "
    "experiment eval_metric=top1 device=cuda amp_dtype=float16 kd_model_name",
    int: "num_classes img_size grad_accum_steps=1 epochs=300 warmup_epochs=5 cooldown_epochs=0 aug_splits=0 "
    "start_epoch recovery_interval=0 log_interval=50 checkpoint_hist=10 seed=42 workers=4",
    float: "lr=0.05 momentum=0.9 weight_decay=2e-5 smoothing=0.1 mixup=0 cutmix=0 aug_repeats=0 model_ema_decay=0.9998",
}
for kind, options in OPTIONS.items():
    for name, given, default in (option.partition("=") for option in options.split()):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=kind(default) if given else None)
for name in "sched_on_updates no_aug no_prefetcher bce_loss jsd_loss amp model_ema".split():
    parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
parser.add_argument("-b", "--batch-size", type=int, default=128)
parser.add_argument("--loss", choices=loss.LOSS_TYPES, metavar="TYPE")
parser.add_argument("--cutmix-minmax", type=float, nargs="+")
parser.add_argument("--device-modules", nargs="+")
parser.add_argument("--torchcompile", nargs="?", const="inductor")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)


def _parse_args():
    args_config, remaining = config_parser.parse_known_args()
    if args_config.config:
        with open(args_config.config) as file:
            parser.set_defaults(**yaml.safe_load(file))
    args = parser.parse_args(remaining)
    for older in ("bce", "jsd"):
        if getattr(args, f"{older}_loss") and args.loss not in (None, older):
            parser.error(f"--{older}-loss and --loss {args.loss} are alternatives")
    return args, yaml.safe_dump(args.__dict__, default_flow_style=False)


def main():
    utils.setup_default_logging()
    args, args_text = _parse_args()
    for module in args.device_modules or ():
        importlib.import_module(module)
    args.prefetcher = not args.no_prefetcher
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = models.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs).to(device=device)
    args.num_classes = model.num_classes if args.num_classes is None else args.num_classes
    config = data.resolve_data_config(vars(args), model=model)
    amp_dtype, amp_autocast, loss_scaler = getattr(torch, args.amp_dtype), suppress, None
    if args.amp:
        amp_autocast = partial(torch.autocast, device_type=device.type, dtype=amp_dtype)
        if device.type == "cuda" and amp_dtype == torch.float16:
            loss_scaler = utils.NativeScaler(device=device.type)

    dataset = partial(data.create_dataset, args.dataset, root=args.data_dir, batch_size=args.batch_size)
    dataset_train = dataset(split=args.train_split, is_training=True, seed=args.seed)
    mixup_active = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    mixup_args = dict(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax)
    mixup_args |= dict(label_smoothing=args.smoothing, num_classes=args.num_classes)
    collate_fn = data.FastCollateMixup(**mixup_args) if mixup_active and args.prefetcher else None
    mixup_fn = data.Mixup(**mixup_args) if mixup_active and not args.prefetcher else None
    if args.aug_splits > 1:
        assert collate_fn is None
        dataset_train = data.AugMixDataset(dataset_train, num_splits=args.aug_splits)
    loader_kwargs = {name: config[name] for name in ("input_size", "mean", "std", "interpolation")}
    loader_kwargs |= dict(batch_size=args.batch_size, num_workers=args.workers, use_prefetcher=args.prefetcher)
    loader_kwargs |= dict(distributed=args.distributed, device=device, persistent_workers=args.workers > 0)
    augmentation = dict(no_aug=args.no_aug, num_aug_repeats=args.aug_repeats, num_aug_splits=args.aug_splits)
    loader_train = data.create_loader(
        dataset_train, is_training=True, collate_fn=collate_fn, **augmentation, **loader_kwargs
    )
    dataset_eval = dataset(split=args.val_split, is_training=False)
    loader_eval = data.create_loader(dataset_eval, is_training=False, crop_pct=config["crop_pct"], **loader_kwargs)

    criterion_kwargs = dict(loss_type=args.loss, smoothing=args.smoothing, soft_targets=mixup_active)
    task_kwargs = dict(criterion_kwargs=criterion_kwargs, device=device, verbose=False)
    if args.kd_model_name is not None:
        task = tasks.LogitDistillationTask(model, args.kd_model_name, **task_kwargs)
    else:
        task = tasks.ClassificationTask(model, **task_kwargs)
    optimizer = optim.create_optimizer_v2(task.get_trainable_module(), **optim.optimizer_kwargs(cfg=args))
    resume_epoch = None
    if args.resume:
        resume_epoch = tasks.resume_task_checkpoint(task, args.resume, optimizer, loss_scaler, log_info=False)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
        if args.resume:
            tasks.load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    eval_model = task.get_eval_model()
    if args.distributed:
        task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)
    model = task.get_trainable_module()

    decreasing, saver, output_dir = args.eval_metric == "loss", None, None
    if utils.is_primary(args):
        output_dir = utils.get_outdir(args.output, args.experiment)
        folders = dict(checkpoint_dir=output_dir, recovery_dir=output_dir, max_history=args.checkpoint_hist)
        saver = utils.CheckpointSaver(
            model, optimizer, args, amp_scaler=loss_scaler, decreasing=decreasing, task=task, **folders
        )
        with open(os.path.join(output_dir, "args.yaml"), "w") as file:
            file.write(args_text)
    updates_per_epoch = (len(loader_train) + args.grad_accum_steps - 1) // args.grad_accum_steps
    schedule = scheduler.scheduler_kwargs(args, decreasing_metric=decreasing)
    lr_scheduler, num_epochs = scheduler.create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates_per_epoch)
    start_epoch = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
    if lr_scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            lr_scheduler.step(start_epoch)

    results = []
    for epoch in range(start_epoch, num_epochs):
        if hasattr(loader_train.sampler, "set_epoch"):
            loader_train.sampler.set_epoch(epoch)
        common = dict(device=device, amp_autocast=amp_autocast)
        outside = dict(lr_scheduler=lr_scheduler, saver=saver, output_dir=output_dir, loss_scaler=loss_scaler)
        outside |= dict(mixup_fn=mixup_fn, num_updates_total=num_epochs * updates_per_epoch)
        train_metrics = train_one_epoch(epoch, model, loader_train, optimizer, args, task=task, **common, **outside)
        eval_metrics = validate(eval_model, loader_eval, task, args, **common)
        if task.has_ema():
            eval_metrics = validate(task.get_eval_model(ema=True), loader_eval, task, args, **common, log_suffix="EMA")
        if output_dir is not None:
            summary, lr = os.path.join(output_dir, "summary.csv"), optimizer.param_groups[0]["lr"]
            utils.update_summary(epoch, train_metrics, eval_metrics, filename=summary, lr=lr)
            saver.save_checkpoint(epoch, metric=eval_metrics[args.eval_metric])
        if lr_scheduler is not None:
            lr_scheduler.step(epoch + 1, eval_metrics[args.eval_metric])
        results.append({"epoch": epoch, "train": train_metrics, "validation": eval_metrics})
    if args.distributed:
        torch.distributed.destroy_process_group()
    if utils.is_primary(args):
        print(f"--result\n{json.dumps(results[-10:], indent=4)}")


def train_one_epoch(
    epoch, model, loader, optimizer, args, task=None, device=None, lr_scheduler=None, saver=None, output_dir=None,
    amp_autocast=suppress, loss_scaler=None, model_dtype=None, mixup_fn=None, num_updates_total=None, naflex_mode=False,
):  # fmt: skip
    losses_m = utils.AverageMeter()
    task.get_trainable_module().train()
    accum_steps = args.grad_accum_steps
    last_accum_steps = len(loader) % accum_steps
    updates_per_epoch = (len(loader) + accum_steps - 1) // accum_steps
    num_updates = epoch * updates_per_epoch
    last_batch_idx = len(loader) - 1
    last_batch_idx_to_accum = len(loader) - last_accum_steps
    optimizer.zero_grad()
    for batch_idx, (input, target) in enumerate(loader):
        last_batch = batch_idx == last_batch_idx
        need_update = last_batch or (batch_idx + 1) % accum_steps == 0
        update_idx = batch_idx // accum_steps
        if batch_idx >= last_batch_idx_to_accum:
            accum_steps = last_accum_steps
        if not args.prefetcher:
            input, target = input.to(device=device, dtype=model_dtype), target.to(device=device)
            if mixup_fn is not None:
                input, target = mixup_fn(input, target)
        with task.no_sync() if args.distributed and not need_update else nullcontext():
            with amp_autocast():
                _loss = task(input, target)["loss"]
            if accum_steps > 1:
                _loss /= accum_steps
            if loss_scaler is not None:
                loss_scaler(_loss, optimizer, need_update=need_update)
            else:
                _loss.backward()
                if need_update:
                    optimizer.step()
        losses_m.update(_loss.item() * accum_steps, input.shape[0])
        if not need_update:
            continue

        num_updates += 1
        optimizer.zero_grad()
        task.update_ema(step=num_updates)
        if utils.is_primary(args) and (update_idx % args.log_interval == 0 or last_batch):
            _logger.info(f"Train: {epoch} [{update_idx}/{updates_per_epoch}] Loss: {losses_m.val:#.3g}")
        if saver is not None and args.recovery_interval and (update_idx + 1) % args.recovery_interval == 0:
            saver.save_recovery(epoch, batch_idx=update_idx)
        if lr_scheduler is not None:
            lr_scheduler.step_update(num_updates=num_updates, metric=losses_m.avg)

    loss_avg = losses_m.avg
    if args.distributed:
        loss_avg = utils.reduce_tensor(torch.tensor([loss_avg], device=device), args.world_size).item()
    return OrderedDict([("loss", loss_avg)])


def validate(model, loader, task, args, device=None, amp_autocast=suppress, model_dtype=None, log_suffix=""):
    model.eval()
    evaluator = task.create_evaluator(max_samples=tasks.evaluation_sample_limit(loader))
    with torch.inference_mode():
        for input, target in loader:
            input, target = input.to(device=device, dtype=model_dtype), target.to(device=device)
            with amp_autocast():
                output = model(input)
            evaluator.update(output, target)
    return evaluator.compute(distributed=args.distributed)


if __name__ == "__main__":
    main()
