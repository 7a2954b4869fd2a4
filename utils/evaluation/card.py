"""The model card of the fine-tuned pipeline, with what an evaluation knows: scores and the comparison picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.evaluation.samples import COMPARISON_FILE
from utils.models.card import CARD_FILE, write_card


def update_card(folder: Path, output_dir: Path, metrics: Mapping[str, Any] | None) -> None:
    """Writes the card of the pipeline in `folder` anew; says so. A folder that cannot be written keeps the old one.

    Args:
        output_dir: the evaluation's, with its picture.
        metrics: metrics.json's content; None without scores.
    """
    picture = output_dir / COMPARISON_FILE
    try:
        if write_card(folder, metrics=metrics, picture=picture if picture.is_file() else None):
            print(f"{folder / CARD_FILE} has the scores and the comparison picture")
    except OSError as error:
        print(f"note: {folder / CARD_FILE} stays as it was ({error.strerror or error})")
