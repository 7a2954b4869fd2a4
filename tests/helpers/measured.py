"""metrics.json in short, without any model: a baseline, and fine-tuned models with the numbers that a test wants."""


def entry(value, interval=None, **more):
    return dict(value=value, interval=interval, **more)


BASELINE = dict(clip_i=0.03, clip_t=0.64, copy_clip=0.08, div_clip=0.45, pres_clip=0.12)
BASELINE |= dict(clip_t_other=0.669, clip_i_other=0.05)
MARGIN = 0.02  # half the width of every change's interval


def measured(*, copied=0, copy_max=0.81, real=0.9, nearest=0.95, margin=MARGIN, blank=(), **values) -> dict:
    """A fine-tuned model that gives no reason to warn, but for what is given."""
    wanted = dict(clip_i=0.74, clip_t=0.62, copy_clip=0.76, div_clip=0.14, pres_clip=0.13)
    wanted |= dict(clip_t_other=0.66, clip_i_other=0.06) | values
    ours = {name: entry(value) for name, value in wanted.items()}
    ours["copy_clip"].update(num_above_photos=copied, num_images=20)
    ours["copy_clip_max"] = entry(copy_max, file="output-1.png")
    ours["blank_images"] = list(blank)
    changes = {name: value - BASELINE[name] for name, value in wanted.items()}
    changes = {name: entry(value, [value - margin, value + margin]) for name, value in changes.items()}
    photos = dict(real_clip=entry(real), nearest_clip=entry(nearest), clip_t_class=entry(0.3), clip_t=entry(0.6))
    baseline = {name: entry(value) for name, value in BASELINE.items()} | dict(blank_images=[])
    models = dict(baseline=baseline, finetuned=ours)
    record = dict(encoders=dict(clip={}, dino=None), photos=photos, models=models)
    return record | dict(changes=dict(finetuned=changes), subject=dict(identifier="sks", class_name="cat"))


def without(record: dict, name: str, reason: str) -> dict:
    """The record if `name` could not be computed."""
    for model, values in record["models"].items():
        values[name] = dict(value=None, reason=reason)
        record["changes"].get(model, {}).pop(name, None)
    return record
