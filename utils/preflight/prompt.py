"""What the preflight table says of a prompt."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from utils.errors import UserError

MAX_TOKENS = 77
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's


def load_quick_tokenizer(folder: Path) -> Tokenizer:
    """The folder's CLIP tokenizer without transformers, whose import takes seconds; it has no learned tokens."""
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
    return tokenizer


def describe_prompt(prompt: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """How many tokens the prompt has, and what is cut off beyond 77 of them."""
    encoding = tokenizer.encode(prompt, add_special_tokens=False)
    count, room = len(encoding.tokens) + 2, MAX_TOKENS - 2  # start and end
    if count > MAX_TOKENS:
        cut_off = prompt[encoding.offsets[room][0] :]
        return f"{count} tokens, but {MAX_TOKENS} are read; cut off: {cut_off!r}", "note"
    return f"{prompt!r}: {count} of {MAX_TOKENS} tokens", "ok"
