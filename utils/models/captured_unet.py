"""The UNet's and the VAE decoder's forward for sampling on a GPU: CUDA graphs, one a shape of input.

A graph runs what fused_unet makes of diffusers' forward, without the host launching each kernel. Graphs read fixed
addresses, so the UNet that samples moves into one buffer of weights that they were captured with.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from utils.errors import first_line
from utils.kernels import operations
from utils.models import fused_unet

WARM_UP_CALLS = 2  # before a capture: kernels are compiled, libraries choose algorithms


class CapturedUNet:
    """Serves UNets of one architecture in turn, from the same graphs; another architecture starts anew.

    The UNet that is to sample and the one whose weights are in the graphs' buffer swap their storages: every module
    keeps its values, and none is held twice.

    Args:
        say: called with one line if a UNet runs without fused kernels or without a graph, and why.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self._architecture: tuple = ()
        self._resident: list[torch.nn.Parameter] = []
        self._graphs: dict[tuple, _Graph | None] = {}
        self._fuses_decoder = operations.HAS_TRITON
        self._decoders: dict[tuple, _Graph] = {}

    @contextlib.contextmanager
    def serving(self, pipeline: Any) -> Iterator[None]:
        """Inside, the pipeline calls its UNet through graphs; afterwards pipeline and UNet are as they were.

        The scheduler's timesteps stay on the CPU meanwhile: it looks them up in tables there, and would have to wait
        for the GPU at every step.
        """
        unet, scheduler, decoder = pipeline.unet, pipeline.scheduler, pipeline.vae.decoder
        if "forward" in vars(unet) or not self._moves_in(unet):
            yield
            return
        unet.forward = partial(self._forward, pipeline)
        decoder.forward = partial(self._decode, decoder)
        scheduler.set_timesteps = partial(_set_timesteps_on_cpu, scheduler)
        try:
            yield
        finally:
            del unet.forward, decoder.forward, scheduler.set_timesteps

    def _forward(
        self,
        pipeline: Any,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """UNet2DConditionModel.forward: sample [N,C,h,w], timestep a scalar tensor, encoder_hidden_states [N,77,D]."""
        unet, is_guided = pipeline.unet, pipeline.do_classifier_free_guidance
        plain = partial(type(unet).forward, unet)
        is_usual = torch.is_tensor(timestep) and timestep.dim() == 0  # one for all images, as the pipeline gives it
        if return_dict or not is_usual or any(value is not None for value in options.values()):
            return plain(sample, timestep, encoder_hidden_states, return_dict=return_dict, **options)
        inputs = sample, timestep, encoder_hidden_states
        key = is_guided, *((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(unet, partial(plain, return_dict=False), inputs, is_guided)
        graph = self._graphs[key]
        return plain(*inputs, return_dict=False) if graph is None else (graph(*inputs),)

    def _decode(self, decoder: Any, *latents: torch.Tensor) -> torch.Tensor:
        """The VAE decoder's forward: fused kernels in a graph, or, if they cannot be had, as it is."""
        plain = partial(type(decoder).forward, decoder)
        if not self._fuses_decoder:
            return plain(*latents)
        key = decoder, *((tensor.shape, tensor.dtype) for tensor in latents)
        try:
            if key not in self._decoders:
                fused_unet.install_decoder(decoder)
                self._decoders[key] = _Graph(lambda *static: (plain(*static),), latents, self._earlier_graph())
            return self._decoders[key](*latents)
        except Exception as error:  # a compiler that is missing, memory
            self._fuses_decoder, self._decoders = False, {}
            self.say(f"images are decoded without fused kernels, more slowly: {first_line(error)}")
        finally:
            fused_unet.uninstall(decoder)
        return plain(*latents)

    def _capture(self, unet: Any, plain: Callable, inputs: tuple, is_guided: bool) -> "_Graph | None":
        """A graph of the fused forward, else of the plain one, else None. Guidance gives the same latents twice."""
        for fuses in dict.fromkeys((operations.HAS_TRITON, False)):
            try:
                if fuses:
                    fused_unet.install(unet, equal_halves=is_guided)
                    if not self._graphs and (line := fused_unet.what_is_not_fused(unet)):
                        self.say(line)
                return _Graph(plain, inputs, self._earlier_graph())
            except Exception as error:  # a compiler that is missing, memory, an operation that cannot be captured
                reason = first_line(error)
            finally:
                fused_unet.uninstall(unet)
            what = "fused kernels" if fuses else "a CUDA graph"
            self.say(f"the UNet samples without {what}, more slowly: {reason}")
        return None

    def _earlier_graph(self) -> "_Graph | None":
        """One whose memory the next may use."""
        return next(filter(None, self._graphs.values()), None)

    def _moves_in(self, unet: Any) -> bool:
        """Puts the UNet's weights where the graphs read them; says so and returns False if memory is too small."""
        if architecture(unet) != self._architecture:
            self._graphs, self._resident = {}, []
            self._architecture = architecture(unet)
        parameters = list(unet.parameters())
        if self._resident and self._resident[0] is parameters[0]:
            return True
        try:
            with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference mode could not leave it
                if self._resident:
                    # They exchange their storages and keep their values.
                    for ours, theirs in zip(parameters, self._resident, strict=True):
                        values = theirs.data.clone()
                        theirs.data.copy_(ours.data)
                        ours.data.copy_(values)
                        ours.data, theirs.data = theirs.data, ours.data
                else:
                    into_one_buffer(parameters)
        except torch.cuda.OutOfMemoryError as error:
            self._graphs, self._resident = {}, []  # part of the weights may have moved
            self.say(f"the UNet samples without a CUDA graph, more slowly: {first_line(error)}")
            return False
        self._resident = parameters
        return True


class _Graph:
    """One call of `forward` on tensors of fixed shapes, captured; the first is on the GPU.

    Args:
        beside: a graph whose memory for intermediate results this one uses too: never are both needed at once.
    """

    def __init__(self, forward: Callable, inputs: tuple[torch.Tensor, ...], beside: "_Graph | None"):
        layouts = [torch.channels_last if each.dim() == 4 else torch.contiguous_format for each in inputs]
        self.inputs = [
            each.to(inputs[0].device, copy=True, memory_format=layout)
            for each, layout in zip(inputs, layouts, strict=True)
        ]
        self.stream: torch.cuda.Stream = beside.stream if beside else torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP_CALLS):
                forward(*self.inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.graph = torch.cuda.CUDAGraph()
        pool = beside.graph.pool() if beside else None
        with torch.cuda.graph(self.graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
            self.output = forward(*self.inputs)[0]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The first of what `forward` returns, [N,C,h,w], a tensor of its own: schedulers keep earlier ones."""
        for static, fresh in zip(self.inputs, inputs, strict=True):
            if fresh.is_cuda:
                static.copy_(fresh)
            else:
                static.fill_(fresh.item())  # a timestep: a copy from the CPU would wait for the GPU
        self.graph.replay()
        return self.output.clone(memory_format=torch.contiguous_format)


def architecture(unet: Any) -> tuple:
    """What two UNets must have in common to run in one graph."""
    config = sorted((name, str(value)) for name, value in unet.config.items() if not name.startswith("_"))
    return config, [(parameter.shape, parameter.dtype, parameter.device) for parameter in unet.parameters()]


def into_one_buffer(parameters: list[torch.nn.Parameter]) -> None:
    """Moves parameters into one buffer, 4-D ones channels_last: fused_unet multiplies by neighbours at once."""
    first = parameters[0]
    numels = [parameter.numel() for parameter in parameters]
    buffer = torch.empty(sum(numels), dtype=first.dtype, device=first.device)
    for parameter, flat in zip(parameters, buffer.split(numels), strict=True):
        parameter.data = operations.shaped(flat, parameter, torch.channels_last).copy_(parameter.data)


def _set_timesteps_on_cpu(scheduler: Any, num_inference_steps: int, device: object = None, **kwargs: Any) -> None:
    type(scheduler).set_timesteps(scheduler, num_inference_steps, **kwargs)
