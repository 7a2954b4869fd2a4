"""The model card of the fine-tuned pipeline, with what an evaluation knows: scores and the comparison picture."""

from collections.abc import Mapping
from pathlib import Path

from utils.errors import UserError
from utils.evaluation.samples import BASELINE, COMPARISON_FILE, FINETUNED, model_folder, read_samples
from utils.evaluation.subjects import means
from utils.models.card import CARD_FILE, write_card
from utils.models.folder import read_base


def update_card(output_dir: Path, measured: Mapping[str, dict | None]) -> None:
    """Writes the card of the pipeline that drew anew; says so. A folder that cannot be written keeps the old one.

    Args:
        output_dir: the evaluation's, of several subjects the first's: its samples.json names the pipeline.
        measured: metrics.json by subject; None without scores. Of several subjects the card has the means, no picture.
    """
    samples = read_samples(output_dir)
    folder = model_folder(samples, FINETUNED)
    scored = {name: metrics for name, metrics in measured.items() if metrics is not None}
    metrics, picture = None, None
    if len(measured) == 1:
        metrics, said = next(iter(measured.values())), "the scores and the comparison picture"
        picture = output_dir / COMPARISON_FILE
    elif len(scored) == len(measured):
        metrics, said = mean_metrics(scored), f"the means of {len(measured)} subjects"
    else:
        said = f"no scores, since not all of {len(measured)} subjects have any"
    try:
        if write_card(read_base(folder), metrics=metrics, picture=picture if picture and picture.is_file() else None):
            print(f"{folder / CARD_FILE} has {said}")
    except (OSError, UserError) as error:
        print(f"note: {folder / CARD_FILE} stays as it was ({getattr(error, 'strerror', None) or error})")


def mean_metrics(measured: Mapping[str, dict]) -> dict:
    """The means over subjects, as metrics.json has one subject's."""
    models = (BASELINE, FINETUNED)
    values = {model: {key: mean._asdict() for key, mean in means(measured, model).items()} for model in models}
    first = next(iter(measured.values()))
    return dict(models=values, num_subjects=len(measured), encoders=first["encoders"])
