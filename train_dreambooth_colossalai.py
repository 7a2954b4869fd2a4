#!/usr/bin/env python3
"""DreamBooth fine-tuning of Stable Diffusion v1.4 on ColossalAI's Booster with the TorchDDP plugin.

torchrun --nproc_per_node 1 train_dreambooth_colossalai.py --pretrained_model_name_or_path DIR \
    --instance_data_dir DIR --instance_prompt "a photo of my cat." --output_dir DIR
"""

import sys
from typing import TYPE_CHECKING

from utils.arguments import parse_command_line
from utils.command_line import run_main
from utils.preflight.table import Ready, run_preflight

if TYPE_CHECKING:
    import torch


def main(argv: list[str] | None = None) -> int:
    """Checks everything that can be checked without loading a model, then trains; returns the exit code."""
    args, argv = parse_command_line(argv)
    ready, exit_code = run_preflight(args)  # prints the table; the plan in it has every default filled in
    if ready is None or args.dry_run:
        return exit_code

    from utils.run.session import session  # only now: torch and ColossalAI take seconds, complaints none

    with session(ready.plan) as device:
        train(ready, argv, device)
    return 0


def train(ready: Ready, argv: list[str], device: "torch.device") -> None:
    """From photos to a pipeline in --output_dir."""
    import torch.distributed as dist

    from utils.data.batches import BatchSource
    from utils.data.class_generation import prepare_class_images
    from utils.data.inputs import encode_inputs
    from utils.models.loading import WEIGHT_DTYPES
    from utils.run.loop import TrainingRun
    from utils.run.record import Sources
    from utils.runtime.colossal import barrier
    from utils.training.build import build_unet
    from utils.training.captured_step import fastest_step
    from utils.training.learning_rates import learning_rate_table
    from utils.training.train_step import TrainStep
    from utils.training.validation import Validation

    base, concepts, dataset, plan, start = ready
    weight_dtype = WEIGHT_DTYPES[plan.mixed_precision]

    # What training reads and never changes: photos and class images after the VAE, prompts after the text encoder.
    class_dataset = None
    if plan.class_images is not None:
        class_dataset = prepare_class_images(concepts, base.folder, start.base_hashes, device, **plan.class_images)
    inputs = encode_inputs(base.folder, dataset, class_dataset, weight_dtype, device, **plan.encoding)
    batches = BatchSource(inputs, rank=dist.get_rank(), device=device, **plan.sampling)

    # What is trained: the UNet in weight_dtype over fp32 masters, boosted with the TorchDDP plugin.
    learning_rates = learning_rate_table(**plan.learning_rates)
    unet, optimizer, booster = build_unet(
        base.folder, weight_dtype, device, learning_rates=learning_rates, **plan.memory, **plan.adamw
    )
    eager_step = TrainStep(unet, optimizer, booster, inputs, **plan.loss)

    # The run: resumes, logs, writes checkpoints, stops when it is asked to.
    run = TrainingRun(plan, Sources(base, concepts, dataset, class_dataset, start), argv, optimizer, device)
    train_step = fastest_step(
        eager_step,
        lambda: batches.micro_batches(run.first_step),
        uses_cuda_graph=plan.uses_cuda_graph,
        say=run.log.say,
    )
    validation = Validation(unet.unwrap(), inputs, is_main=run.is_main, **plan.validation)
    if run.first_step == 0 and validation.is_due(0):
        run.log.validation(0, *validation())
    with run:
        for step in run.steps():
            run.log.step(step + 1, train_step(batches.micro_batches(step)))
            if validation.is_due(step + 1):
                run.log.validation(step + 1, *validation())
        run.save_pipeline()
    barrier(device)


if __name__ == "__main__":
    sys.exit(run_main(main))
