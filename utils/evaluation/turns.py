"""The models of an evaluation take turns in one UNet: whose weights are in it, and whose come next."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch

from utils.evaluation.hashes import model_folders
from utils.evaluation.plan import EvaluationPlan
from utils.evaluation.samples import BASELINE, FINETUNED
from utils.files.hashing import in_background
from utils.models import exporting

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


class WeightsInTurn:
    """A pipeline for every model: its own, or the fine-tuned one with the model's weights put into its UNet.

    The weights change in place, so that the graphs that read them stay good, and no module is loaded twice. While a
    GPU draws, the host, which has nothing else to do, blends the next model's weights.
    """

    def __init__(self, plan: EvaluationPlan, pipelines: dict):
        self.folders = model_folders(plan)
        self.models = {model.name: model for model in self.folders}
        self.pipelines = pipelines
        self.held = {id(pipelines[name].unet): name for name in (FINETUNED, BASELINE)}  # whose weights a UNet holds
        self.looks_ahead = pipelines[BASELINE].device.type == "cuda"
        self.coming: dict[str, Future] = {}

    def of(self, name: str) -> "StableDiffusionPipeline":
        """The pipeline that draws for the model `name`, whatever weights it holds now."""
        return self.pipelines[BASELINE if name == BASELINE else FINETUNED]

    def describe(self, hashes: dict) -> dict[str, dict]:
        """Path, scheduler and SHA-256 of the files of every model."""
        found = {}
        for model, (folder, unet) in self.folders.items():
            path = str(unet / "unet" if model.checkpoint else folder)
            scheduler = type(self.of(model.name).scheduler).__name__
            strength = dict(strength=model.strength) if model.strength != 1 else {}
            found[model.name] = dict(path=path, scheduler=scheduler, sha256=hashes[model.name], **strength)
        return found

    def pipeline(self, name: str, later: Sequence[str] = ()) -> "StableDiffusionPipeline":
        """Of the model `name`, until the next call; the next calls will be for the models `later`."""
        pipeline = self.of(name)
        if self.held[id(pipeline.unet)] != name:
            coming = self.coming.pop(name, None)
            exporting.load_weights(pipeline.unet, self.weights(name) if coming is None else coming.result())
            self.held[id(pipeline.unet)] = name
        following = next((model for model in later if model not in self.held.values()), None)
        if following is not None and self.looks_ahead and following not in self.coming:
            self.coming = {following: in_background(self.cast_weights, following)}
        return pipeline

    def weights(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the model's UNet, from its files."""
        tuned, baseline = (self.folders[self.models[model]][1] for model in (name, BASELINE))
        return exporting.blended_weights(baseline, tuned, self.models[name].strength)

    def cast_weights(self, name: str) -> list[tuple[str, torch.Tensor]]:
        """All of them, on the host, in the dtype that draws."""
        dtype = self.pipelines[FINETUNED].unet.dtype
        return [(key, value.to(dtype)) for key, value in self.weights(name)]
