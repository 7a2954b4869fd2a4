"""One frozen value with everything that a run does: every default filled in, once, for everyone else.

Each group of a Plan holds the keyword arguments of one function, under that function's own names, so that no other
package knows of the command line. Nothing here imports torch: the checks before a run make the plan.
"""

import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from utils.arguments import LOSS, as_plain, training_parser
from utils.training.memory import MemoryNeeds

Keywords = Mapping[str, Any]
DEFAULT_VALIDATION_STEPS = 100  # with --validation_prompt


class Plan(NamedTuple):
    """What follows from the arguments, the photos, the base, the ranks and the device.

    `arguments` are the command line's as JSON values, with the defaults filled in: what run.json records. `changed`
    are those that are not what they are without their flags. A field with a flag's name is that flag's value.
    """

    arguments: Keywords
    changed: frozenset[str]
    num_steps: int
    num_ranks: int
    samples_per_step: int
    mixed_precision: str  # a key of models.loading.WEIGHT_DTYPES
    needs: MemoryNeeds
    seed: int
    deterministic: bool
    class_images: Keywords | None  # data.class_generation.prepare_class_images; None without prior preservation
    encoding: Keywords  # data.inputs.encode_inputs
    sampling: Keywords  # data.inputs.BatchSource
    learning_rates: Keywords  # training.build.learning_rate_table
    optimizer: Keywords  # training.build.build_unet
    loss: Keywords  # diffusion.Loss
    uses_cuda_graph: bool
    reads_ahead: bool  # the UNet's weights go to the GPU from the first second: it has room for them
    validation: Keywords  # training.validation.Validation
    output_dir: Path
    checkpoints: Keywords  # run.checkpoint.Checkpointer
    checkpointing_steps: int
    max_nonfinite_steps: int
    save_dtype: str
    save_format: str
    export_single_file: Path | None


def make_plan(
    args: Namespace,
    *,
    num_parameters: int,
    num_photos: int,
    num_ranks: int,
    on_gpu: bool,
    save_dtype: str,
    has_bf16: bool = True,
) -> Plan:
    """The plan of a run, with --mixed_precision, --max_train_steps and --save_dtype filled in if they were left out.

    `num_parameters` are the UNet's, `save_dtype` is that of the base's own file. Without `has_bf16` fp16 takes the
    place of bf16.
    """
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_ranks
    defaults = training_parser().get_default
    changed = frozenset(name for name, value in vars(args).items() if value != defaults(name))
    args = Namespace(**vars(args))
    args.mixed_precision = args.mixed_precision or ("fp16" if on_gpu else "no")
    for precision in () if has_bf16 else ("mixed_precision", "prior_generation_precision"):
        if getattr(args, precision) == "bf16":
            setattr(args, precision, "fp16")
    args.max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * num_photos / samples_per_step)
    args.save_dtype = args.save_dtype or save_dtype
    prior_loss_weight = args.prior_loss_weight if args.with_prior_preservation else None
    return Plan(
        arguments=as_plain(args),
        changed=changed,
        num_steps=args.max_train_steps,
        num_ranks=num_ranks,
        samples_per_step=samples_per_step,
        needs=memory_needs(args, num_parameters=num_parameters, num_ranks=num_ranks),
        loss=_named(args, *LOSS) | dict(prior_loss_weight=prior_loss_weight),
        uses_cuda_graph=not args.no_cuda_graph,
        reads_ahead=on_gpu and args.offload_optimizer == "none" and not args.with_prior_preservation,
        **_inputs(args, samples_per_step, num_ranks),
        **_updates(args, samples_per_step),
        checkpoints=dict(save_dtype=args.save_dtype, total_limit=args.checkpoints_total_limit),
        **_named(args, *(name for name in Plan._fields if hasattr(args, name))),
    )


def _inputs(args: Namespace, samples_per_step: int, num_ranks: int) -> dict[str, Any]:
    drawing = dict(num_inference_steps=args.validation_inference_steps, guidance_scale=args.validation_guidance_scale)
    encoding = dict(
        **_named(args, "tokenizer_name", "seed"),
        shown=[*args.validation_prompt, args.validation_negative_prompt or ""] if args.validation_prompt else [],
        drawing=drawing,
        num_samples=args.max_train_steps * samples_per_step,
    )
    sampling = dict(
        **_named(args, "seed", "noise_offset"),
        num_ranks=num_ranks,
        batch_size=args.train_batch_size,
        num_micro_batches=args.gradient_accumulation_steps,
    )
    every = args.validation_steps or (DEFAULT_VALIDATION_STEPS if args.validation_prompt else 0)
    validation = dict(every=every, num_images=args.num_validation_images, seed=args.seed)
    class_images = dict(
        **_named(args, "num_class_images", "sample_batch_size", "resolution", "center_crop", "seed"),
        precision=args.prior_generation_precision,
        uses_cuda_graph=not args.no_cuda_graph,
    )
    drawn = class_images if args.with_prior_preservation else None
    return dict(class_images=drawn, encoding=encoding, sampling=sampling, validation=validation)


def _updates(args: Namespace, samples_per_step: int) -> dict[str, Any]:
    learning_rates = dict(
        lr=args.learning_rate * (samples_per_step if args.scale_lr else 1),
        lr_scheduler=args.lr_scheduler,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    optimizer = dict(
        **_named(args, "max_grad_norm", "use_8bit_adam", "gradient_checkpointing", "offload_optimizer"),
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
    )
    return dict(learning_rates=learning_rates, optimizer=optimizer)


def _named(args: Namespace, *names: str) -> dict[str, Any]:
    """The flags of these names, for a function that calls them so."""
    return {name: getattr(args, name) for name in names}


def memory_needs(args: Namespace, *, num_parameters: int, num_ranks: int) -> MemoryNeeds:
    """What decides how much memory a run takes; --mixed_precision must be filled in."""
    flags = _named(args, *(name for name in MemoryNeeds._fields if hasattr(args, name)))
    return MemoryNeeds(num_parameters=num_parameters, num_ranks=num_ranks, fp32=args.mixed_precision == "no", **flags)
