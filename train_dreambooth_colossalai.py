#!/usr/bin/env python3
"""DreamBooth fine-tuning of Stable Diffusion v1.4 on ColossalAI's Booster with the TorchDDP plugin.

torchrun --nproc_per_node 1 train_dreambooth_colossalai.py --pretrained_model_name_or_path DIR \
    --instance_data_dir DIR --instance_prompt "a photo of my cat." --output_dir DIR
"""

import functools
from typing import TYPE_CHECKING

from utils.arguments import parse_command_line
from utils.command_line import leave, mistakes_for_all_ranks, run_main
from utils.files.hashing import in_background
from utils.models.weight_files import read_onto
from utils.preflight.checks import run_preflight
from utils.runtime import process
from utils.runtime.environment import local_rank, rank

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch

    from utils.run.plan import Plan
    from utils.run.resume import Sources


def main(argv: list[str] | None = None) -> int:
    """Checks everything that can be checked without loading a model, then trains; returns the exit code."""
    process.start_clock()
    with mistakes_for_all_ranks(argv):
        args, argv, notes = parse_command_line(argv)
        plan, sources, exit_code = run_preflight(args, notes)  # prints the table; the plan has every default filled in
    if plan is None or sources is None or args.dry_run:
        return exit_code

    unet_files, gpu = sources.base.weights["unet"].files, f"cuda:{local_rank()}"
    ahead = in_background(read_onto, unet_files, gpu) if plan.reads_ahead else None
    from utils.run.loop import session  # only now: torch and ColossalAI take seconds, complaints none

    with session(plan, sources) as device:
        train(plan, sources, argv, device, ahead)
    return 0


def train(plan: "Plan", sources: "Sources", argv: list[str], device: "torch.device", ahead: "Future | None") -> None:
    """From photos to a pipeline in --output_dir; `ahead` will be the UNet's weights, if they are being read."""
    from utils.data.class_generation import prepare_class_images
    from utils.data.inputs import BatchSource, encode_inputs
    from utils.diffusion import Loss
    from utils.models.loading import WEIGHT_DTYPES
    from utils.run.loop import TrainingRun
    from utils.training.build import build_unet
    from utils.training.train_step import TrainStep, fastest_step
    from utils.training.validation import Validation

    base, weight_dtype = sources.base, WEIGHT_DTYPES[plan.mixed_precision]

    # What training reads and never changes: photos and class images after the VAE, prompts after the text encoder.
    class_images = prepare_class_images(sources.concepts, base, sources.base_hashes, device, plan.class_images)
    inputs = encode_inputs(base, sources.dataset, class_images, weight_dtype, device, **plan.encoding)
    batches = BatchSource(inputs, rank=rank(), device=device, **plan.sampling)

    # What is trained: the UNet in weight_dtype over fp32 masters, boosted with the TorchDDP plugin.
    unet, optimizer, booster = build_unet(base, weight_dtype, device, plan.learning_rates, ahead, **plan.optimizer)
    loss = Loss(inputs.noise_scheduler, device, **plan.loss)
    eager_step = TrainStep(unet, optimizer, booster, inputs, loss)

    # The run: resumes, logs, writes checkpoints, stops when it is asked to.
    run = TrainingRun(plan, sources, class_images, argv, optimizer, device)
    first_batches = functools.partial(batches.micro_batches, run.first_step)
    train_step = fastest_step(eager_step, first_batches, uses_cuda_graph=plan.uses_cuda_graph, say=run.log.say)
    validation = Validation(unet.unwrap(), inputs, loss, is_main=run.is_main, **plan.validation)
    if run.first_step == 0 and validation.is_due(0):
        run.log.validation(0, validation)
    with run:
        for step in run.steps():
            run.log.step(step + 1, train_step(batches.micro_batches(step)))
            if validation.is_due(step + 1):
                run.log.validation(step + 1, validation)
        run.save_pipeline()


if __name__ == "__main__":
    leave(run_main(main, interrupted="interrupted before the training began"))
