#!/usr/bin/env python3
"""DreamBooth fine-tuning of Stable Diffusion v1.4 on ColossalAI's Booster with the TorchDDP plugin.

torchrun --nproc_per_node 1 train_dreambooth_colossalai.py --pretrained_model_name_or_path DIR \
    --instance_data_dir DIR --instance_prompt "a photo of my cat." --output_dir DIR
"""

import sys
from argparse import Namespace

from utils.arguments import parse_args
from utils.errors import run_main
from utils.preflight import BaseModel
from utils.preflight_table import run_preflight


def main(argv: list[str] | None = None) -> int:
    """Checks everything that can be checked without loading a model, then trains; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    ready = run_preflight(args)
    if args.dry_run:
        return ready.exit_code

    # Imported only now, so that --help and complaints are instant.
    import torch.distributed as dist

    from utils.colossal import get_accelerator, launch
    from utils.train_step import training_stream

    launch(args.seed)
    device = get_accelerator().get_current_device()
    try:
        with training_stream(device):
            train(args, argv, ready.base, ready.dataset, ready.start, device)
    finally:
        dist.destroy_process_group()
    return 0


def train(args: Namespace, argv: list[str], base: BaseModel, dataset, start, device) -> None:
    """Trains the UNet on the photos and writes the new pipeline to args.output_dir."""
    import torch.distributed as dist

    from utils import logs, run_record
    from utils.colossal import barrier
    from utils.guard import Guard
    from utils.train_step import BatchSource, CapturedStep, TrainStep

    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    plan = run_record.plan_run(args, num_photos=len(dataset), num_ranks=num_ranks, device=device)
    encoder_hidden_states, latents, noise_scheduler, scaling_factor = encode_inputs(args, base, dataset, plan, device)
    unet, optimizer, booster = boost_unet(args, base, plan, device)
    batches = BatchSource(
        latents,
        seed=args.seed,
        rank=rank,
        num_ranks=num_ranks,
        batch_size=args.train_batch_size,
        num_micro_batches=args.gradient_accumulation_steps,
        num_train_timesteps=noise_scheduler.config.num_train_timesteps,
        device=device,
    )
    train_step = TrainStep(
        unet=unet,
        optimizer=optimizer,
        booster=booster,
        noise_scheduler=noise_scheduler,
        encoder_hidden_states=encoder_hidden_states,
        scaling_factor=scaling_factor,
    )

    is_main, first = rank == 0, start.checkpoint
    record = run_record.RunRecord(args, argv, plan, dataset, base, device, is_main=is_main, checkpoint=first)
    if is_main:
        print(record.summary(), flush=True)
    first_step = first.step if first else 0
    log = logs.TrainingLog(args, num_steps=plan.num_steps, is_main=is_main, device=device, first_step=first_step)
    if device.type == "cuda" and not args.no_cuda_graph:
        train_step = CapturedStep(train_step, log.say)
    with Guard(args, argv, base, start, optimizer, record, log, plan.num_steps) as guard:
        for step in range(guard.first_step, plan.num_steps):
            log.step(step + 1, train_step(batches.micro_batches(step)))
            guard.after_step(step + 1)
        guard.finish(booster, unet)
    barrier(device)


def encode_inputs(args: Namespace, base: BaseModel, dataset, plan, device) -> tuple:
    """What stays frozen: the prompt and the photos go through it once, then it is freed.

    Returns encoder_hidden_states [1,77,C], the InstanceLatents, the noise scheduler and the VAE's scaling factor.
    """
    from utils import models
    from utils.diffusion import encode_prompt
    from utils.latents import InstanceLatents

    tokenizer = models.load_tokenizer(base.folder, args.tokenizer_name)
    text_encoder = models.load_text_encoder(base.folder, plan.weight_dtype, device)
    input_ids = models.tokenize(tokenizer, args.instance_prompt).to(device)
    vae = models.load_vae(base.folder, plan.weight_dtype, device)
    latents = InstanceLatents(dataset, vae)
    return (
        encode_prompt(text_encoder, input_ids),
        latents,
        models.load_noise_scheduler(base.folder),
        vae.config.scaling_factor,
    )


def boost_unet(args: Namespace, base: BaseModel, plan, device) -> tuple:
    """What is trained: fp32 masters from the file's own weights, the UNet itself in weight_dtype, boosted.

    Returns the boosted UNet, the MasterWeightsOptimizer and the Booster.
    """
    import torch

    from utils import fused_unet, models
    from utils.colossal import boost
    from utils.optimizer import FlatParameters, MasterWeightsOptimizer

    unet = models.load_unet(base.folder)
    if args.gradient_checkpointing:
        models.enable_gradient_checkpointing(unet)
    on_gpu = device.type == "cuda"
    memory_format = torch.channels_last if on_gpu else torch.contiguous_format
    one_gpu = on_gpu and plan.num_ranks == 1
    flat = FlatParameters(unet, plan.weight_dtype, device, memory_format, scattered_grads=one_gpu)
    if on_gpu:
        fused_unet.install(unet)
    optimizer = MasterWeightsOptimizer(
        flat,
        learning_rates=plan.learning_rates,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        max_grad_norm=args.max_grad_norm,
    )
    return boost(unet, optimizer)


if __name__ == "__main__":
    sys.exit(run_main(main))
