"""What the preflight table says of the prompt."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENS = 77


PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's


def load_quick_tokenizer(folder: Path) -> "Tokenizer":
    """The folder's CLIP tokenizer without transformers, whose import takes seconds."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        if not (folder / "vocab.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        split = (line.split() for line in lines if line and not line.startswith("#version"))
        merges = [(left, right) for left, right in split]
        unknown = "<|endoftext|>"
        bpe = models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=unknown, fuse_unk=False)
    except Exception as error:  # tokenizers raises Exception itself
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} holds no CLIP tokenizer ({reason}); copy or download it again") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def describe_prompt(prompt: str, folder: Path) -> tuple[str, str]:
    """How the prompt is split into tokens, and what is cut off beyond 77 of them."""
    encoding = load_quick_tokenizer(folder).encode(prompt, add_special_tokens=False)
    room = MAX_TOKENS - 2  # start and end
    if len(encoding.tokens) > room:
        start = encoding.offsets[room][0]
        return f"{len(encoding.tokens) + 2} tokens, but {MAX_TOKENS} are read; cut off: {prompt[start:]!r}", "note"
    return f"{len(encoding.tokens) + 2} tokens: {' '.join(readable_pieces(encoding.tokens))}", "ok"


def readable_pieces(tokens: list[str]) -> list[str]:
    """Tokens as text, "|" at the end of a word: CLIP spells bytes as letters, so that its own name of café| is cafÃ©.

    Tokens that hold a part of a character only are one piece.
    """
    from tokenizers import decoders

    decoder, pieces, part = decoders.ByteLevel(), [], ""
    for number, token in enumerate(tokens, 1):
        part += token.removesuffix("</w>")
        text = decoder.decode([part])
        if "\ufffd" not in text or number == len(tokens):
            pieces.append(text + ("|" if token.endswith("</w>") else ""))
            part = ""
    return pieces
