"""How far apart prompts are for the UNet: distances of the text encoder's output.

python -m bench.prompt_distance --model model/tiny-stable-diffusion "a photo of a cat" "a photo of my cat." ...

Prints for every prompt after the first its tokens and |E(prompt) - E(first)| / |E(first)|, where E is the encoder's
output [77,C] and |.| the root of the sum of squares. For scale, name a prompt of another thing too.
"""

from pathlib import Path

import torch

from bench.command_line import make_parser
from utils.diffusion import encode_prompt
from utils.models import loading
from utils.models.folder import read_base


@torch.no_grad()
def distances(folder: Path, prompts: list[str]) -> list[tuple[str, list[str], float]]:
    """(prompt, its tokens, its distance from the first prompt as a fraction of that one's norm)."""
    tokenizer = loading.load_tokenizer(folder / "tokenizer")
    text_encoder = loading.load_frozen(read_base(folder), "text_encoder", torch.float32, torch.device("cpu"))
    encoded = [encode_prompt(text_encoder, loading.tokenize(prompt, tokenizer, text_encoder)) for prompt in prompts]
    far = [float((each - encoded[0]).norm() / encoded[0].norm()) for each in encoded]
    return [(prompt, tokenizer.tokenize(prompt), each) for prompt, each in zip(prompts, far, strict=True)]


def main(argv=None) -> None:
    parser = make_parser(__doc__, __spec__.name, results=False)
    parser.add_argument("--model", type=Path, required=True, help="a pipeline's folder")
    parser.add_argument("prompts", nargs="+", help="prompts to compare")
    args = parser.parse_args(argv)
    for prompt, tokens, distance in distances(args.model, args.prompts):
        print(f"{distance:.3f}  {prompt!r}  {' '.join(token.removesuffix('</w>') for token in tokens)}")


if __name__ == "__main__":
    main()
