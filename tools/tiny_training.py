"""What the stages of the miniature's training share. Each has a time budget, which its learning rate follows."""

import math
import time

import torch

NUM_REPORTS = 25  # lines a stage


class Budget:
    """Iterates over (step, fraction of a stage's time spent); a stage may go on over several commands.

    `keep` names what its state is made of and takes it up from `path` if that is there; the state is written when the
    iteration ends, after `seconds` in all or `limit` seconds of this command.
    """

    def __init__(self, path, seconds, device, report, limit=math.inf, min_steps=4, rate=1.0):
        self.path, self.seconds, self.device, self.report = path, seconds, device, report
        self.limit, self.min_steps, self.rate = limit, min_steps, rate
        self.kept, self.step, self.spent, self.num_reports = {}, 0, 0.0, 0

    @property
    def name(self):
        return self.path.stem

    @property
    def fraction(self):
        return min(self.spent / self.seconds, 1.0)

    def keep(self, **parts):
        """Anything with state_dict and load_state_dict."""
        self.kept = parts
        if self.path.exists():
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self.spent = state["step"], state["spent"]
            self.num_reports = self.fraction * NUM_REPORTS

    def __iter__(self):
        start, before, first = time.monotonic(), self.spent, self.step
        while self.fraction < 1 and (self.spent - before < self.limit or self.step < first + self.min_steps):
            yield self.step, self.fraction
            self.step += 1
            if self.device.type == "cuda" and self.step % 10 == 0:
                torch.cuda.synchronize()  # else the clock would run ahead of the work
            self.spent = before + time.monotonic() - start
        self.report(f"{self.name}: {self.step} steps in {self.spent:.0f} of {self.seconds:.0f} s")
        state = {name: part.state_dict() for name, part in self.kept.items()}
        torch.save(dict(state, step=self.step, spent=self.spent), self.path)

    def note(self, step, fraction, **values):
        """Reports about NUM_REPORTS times a stage; `values` are read back only then."""
        if fraction * NUM_REPORTS >= self.num_reports:
            self.num_reports += 1
            numbers = " ".join(f"{name} {value.item():.4f}" for name, value in values.items())
            self.report(f"{self.name} step {step} ({fraction:.0%}): {numbers}")


class Average(torch.nn.Module):
    """An exponential average of parameters, for drawing: steadier than the last step's."""

    def __init__(self, parameters):
        super().__init__()
        self.parameters_of_model = list(parameters)
        self.values = torch.nn.ParameterList([value.detach().clone() for value in self.parameters_of_model])
        self.values.requires_grad_(False)

    @torch.no_grad()
    def update(self, step, longest=0.9995):
        decay = min(longest, (1 + step) / (10 + step))
        current = [value.detach() for value in self.parameters_of_model]
        torch._foreach_lerp_(list(self.values), current, 1 - decay)

    @torch.no_grad()
    def apply(self):
        torch._foreach_copy_([value.detach() for value in self.parameters_of_model], list(self.values))


def new_optimizer(parameters, device, **options):
    """AdamW whose learning rate is a tensor on a GPU, so that a captured step can see it change."""
    if device.type == "cuda":
        return torch.optim.AdamW(parameters, torch.tensor(0.0, device=device), fused=True, capturable=True, **options)
    return torch.optim.AdamW(parameters, 0.0, **options)


def set_lr(optimizer, peak, step, fraction, warmup_steps=200):
    """Linear warm-up in steps, then half a cosine in time, down to 1% of the peak."""
    lr = peak * min(1.0, (step + 1) / warmup_steps) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * fraction)))
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def update(optimizer, loss, parameters):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def to_unit(pixels):
    """uint8 [B, 3, 64, 64] -> float in [-1, 1], each picture mirrored with probability one half."""
    pixels = pixels.float() / 127.5 - 1
    mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    return torch.where(mirrored, pixels.flip(-1), pixels)


def captured(step_function, device):
    """The same step as one CUDA graph: small layers are bound by the launching of their kernels otherwise."""
    if device.type != "cuda":
        return step_function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step_function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = step_function()

    def replay():
        graph.replay()
        return values

    return replay
