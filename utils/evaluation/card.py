"""The model card of the fine-tuned pipeline, with what an evaluation knows: scores and the comparison picture."""

from pathlib import Path

from utils.errors import UserError
from utils.evaluation.samples import COMPARISON_FILE, FINETUNED, model_folder, read_samples
from utils.models.card import CARD_FILE, write_card
from utils.models.folder import read_base


def update_card(output_dir: Path, metrics: dict | None) -> None:
    """Writes the card of the pipeline that drew, by samples.json. A folder that cannot be written keeps its.

    Args:
        metrics: metrics.json; None without scores.
    """
    folder, picture = model_folder(read_samples(output_dir), FINETUNED), output_dir / COMPARISON_FILE
    try:
        write_card(read_base(folder), metrics=metrics, picture=picture if picture.is_file() else None)
    except (OSError, UserError) as error:
        print(f"note: {folder / CARD_FILE} stays as it was ({getattr(error, 'strerror', None) or error})")
