#!/usr/bin/env python3
"""DreamBooth fine-tuning of Stable Diffusion v1.4 on ColossalAI's Booster with the TorchDDP plugin.

torchrun --nproc_per_node 1 train_dreambooth_colossalai.py --pretrained_model_name_or_path DIR \
    --instance_data_dir DIR --instance_prompt "a photo of my cat." --output_dir DIR
"""

import contextlib
import sys
from argparse import Namespace

from utils.arguments import expand_config, parse_args
from utils.command_line import run_main
from utils.files.lock import hold_output
from utils.models.folder import BaseModel
from utils.preflight.table import Ready, run_preflight
from utils.runtime import timing
from utils.runtime.environment import is_main


def main(argv: list[str] | None = None) -> int:
    """Checks everything that can be checked without loading a model, then trains; returns the exit code."""
    timing.start()
    argv = expand_config(argv)
    args = parse_args(argv)
    ready = run_preflight(args)
    if args.dry_run:
        return ready.exit_code

    # Imported only now, so that --help and complaints are instant.
    import torch.distributed as dist

    from utils.models.folder import num_parameters
    from utils.runtime.colossal import get_accelerator, launch
    from utils.runtime.determinism import deterministic_kernels
    from utils.runtime.ranks import lost_rank_in_one_line
    from utils.training.captured_step import training_stream
    from utils.training.memory import out_of_memory_in_one_line

    with hold_output(args.output_dir, is_main()), contextlib.ExitStack() as surroundings:
        launch(args.seed)
        surroundings.callback(dist.destroy_process_group)
        device = get_accelerator().get_current_device()
        surroundings.enter_context(deterministic_kernels(args.deterministic))
        surroundings.enter_context(lost_rank_in_one_line())
        surroundings.enter_context(training_stream(device))
        surroundings.enter_context(out_of_memory_in_one_line(args, num_parameters(ready.base)))
        train(args, argv, ready, device)
    return 0


def train(args: Namespace, argv: list[str], ready: Ready, device) -> None:
    """Trains the UNet on the photos, and on class images if asked to; writes the new pipeline to args.output_dir."""
    import torch.distributed as dist

    from utils.data.batches import BatchSource
    from utils.data.class_generation import prepare_class_images
    from utils.data.inputs import encode_inputs
    from utils.run import logs
    from utils.run.loop import Guard
    from utils.run.plan import plan_run
    from utils.run.record import RunRecord
    from utils.runtime.colossal import barrier
    from utils.training.captured_step import CapturedStep
    from utils.training.train_step import TrainStep
    from utils.training.validation import Validation

    base, dataset, start = ready.base, ready.dataset, ready.start
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    plan = plan_run(args, num_photos=len(dataset), num_ranks=num_ranks, device=device)
    class_dataset = prepare_class_images(args, ready.concepts, base.folder, start.base_hashes, device)
    inputs = encode_inputs(args, base.folder, dataset, class_dataset, plan, device)
    unet, optimizer, booster = boost_unet(args, base, plan, device)
    batches = BatchSource(
        inputs,
        seed=args.seed,
        rank=rank,
        num_ranks=num_ranks,
        batch_size=args.train_batch_size,
        num_micro_batches=args.gradient_accumulation_steps,
        noise_offset=args.noise_offset,
        device=device,
    )
    train_step = TrainStep(
        unet=unet,
        optimizer=optimizer,
        booster=booster,
        inputs=inputs,
        prior_loss_weight=args.prior_loss_weight,
    )

    is_main, first = rank == 0, start.checkpoint
    inputs_of_run = dict(concepts=ready.concepts, class_dataset=class_dataset, start=start)
    record = RunRecord(args, argv, plan, dataset, device, is_main=is_main, **inputs_of_run)
    if is_main:
        print(record.summary(), flush=True)
    first_step = first.step if first else 0
    log = logs.TrainingLog(args, num_steps=plan.num_steps, is_main=is_main, device=device, first_step=first_step)
    if device.type == "cuda":
        if reason := train_step.rehearse(batches.micro_batches(first_step)):
            log.say(f"kernels are compiled as they first run, not all ahead: {reason}")
        if not args.no_cuda_graph:
            train_step = CapturedStep(train_step, log.say)
    if is_main:
        validation = Validation(args, inputs, unet.unwrap(), log, first_step=first_step)
    with Guard(args, argv, base, start, optimizer, record, log, plan.num_steps) as guard:
        for step in range(guard.first_step, plan.num_steps):
            log.step(step + 1, train_step(batches.micro_batches(step)))
            if is_main:
                validation.after_step(step + 1)
            guard.after_step(step + 1)
        guard.finish()
    barrier(device)


def boost_unet(args: Namespace, base: BaseModel, plan, device) -> tuple:
    """What is trained: fp32 masters from the file's own weights, the UNet itself in weight_dtype, boosted.

    Returns the boosted UNet, the MasterWeightsOptimizer and the Booster.
    """
    import torch

    from utils.models import fused_unet, loading
    from utils.runtime.colossal import boost
    from utils.training.build import enable_gradient_checkpointing
    from utils.training.flat_parameters import FlatParameters
    from utils.training.optimizer import MasterWeightsOptimizer

    unet = loading.load_unet(base.folder)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(unet)
    on_gpu = device.type == "cuda"
    memory_format = torch.channels_last if on_gpu else torch.contiguous_format
    flat = FlatParameters(
        unet,
        plan.weight_dtype,
        device,
        memory_format,
        scattered_grads=on_gpu and not args.use_8bit_adam,
        offload_optimizer=args.offload_optimizer,
    )
    if on_gpu:
        fused_unet.install(unet)
    optimizer = MasterWeightsOptimizer(
        flat,
        learning_rates=plan.learning_rates,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        max_grad_norm=args.max_grad_norm,
        use_8bit_adam=args.use_8bit_adam,
    )
    return boost(unet, optimizer)


if __name__ == "__main__":
    sys.exit(run_main(main))
