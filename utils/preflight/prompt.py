"""What the preflight table says of the prompt."""

import itertools
import json
from collections.abc import Collection
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from utils.errors import UserError
from utils.files.json_files import read_json_or_none

MAX_TOKENS = 77

PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's


def load_quick_tokenizer(folder: Path) -> Tokenizer:
    """The folder's CLIP tokenizer without transformers, whose import takes seconds."""
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
    for token, number in sorted(learned_tokens(folder).items(), key=lambda pair: pair[1]):
        tokenizer.add_tokens([AddedToken(token, normalized=True)])
        if tokenizer.token_to_id(token) != number:
            raise UserError(
                f"{folder}: the learned token {token!r} is number {number}, but the next free number is "
                f"{tokenizer.token_to_id(token)}; copy the folder again"
            )
    return tokenizer


def learned_tokens(folder: Path) -> dict[str, int]:
    """{token: number} that a tokenizer has beyond CLIP's vocabulary (textual inversion), in any of its files."""
    beside = read_json_or_none(folder / "added_tokens.json") or {}
    config = (read_json_or_none(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder")
    whole = (read_json_or_none(folder / "tokenizer.json") or {}).get("added_tokens")
    found = {token: number for token, number in beside.items() if type(number) is int}
    for number, entry in config.items() if isinstance(config, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(number).isdigit():
            found[entry["content"]] = int(number)
    for entry in whole if isinstance(whole, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int:
            found[entry["content"]] = entry["id"]
    return {token: number for token, number in found.items() if not token.startswith("<|")}  # CLIP's own


def with_all_vectors(prompt: str, tokenizer: Tokenizer, learned: Collection[str]) -> str:
    """The prompt with <x> <x>_1 <x>_2 for a learned token <x> of several vectors, as diffusers' pipelines have it."""
    for token in dict.fromkeys(tokenizer.encode(prompt, add_special_tokens=False).tokens):
        if token in learned:
            others = itertools.takewhile(learned.__contains__, (f"{token}_{n}" for n in itertools.count(1)))
            prompt = prompt.replace(token, " ".join([token, *others]))
    return prompt


def check_tokens(prompt: str, folder: Path, vocab_size: int) -> None:
    """Raises UserError if the text encoder's embedding has no row for one of the prompt's tokens.

    `folder` is the tokenizer's, `vocab_size` the rows of the embedding.
    """
    encoding = load_quick_tokenizer(folder).encode(prompt, add_special_tokens=False)
    for token, number in zip(encoding.tokens, encoding.ids, strict=True):
        if number >= vocab_size:
            raise UserError(
                f"{prompt!r}: {folder} has {token!r} as token number {number}, but the text encoder's embedding has "
                f"{vocab_size} rows (a token of textual inversion?); use the text_encoder/ that was saved with "
                f"this tokenizer, or another word"
            )


def describe_prompt(prompt: str, folder: Path) -> tuple[str, str]:
    """How the prompt is split into tokens, and what is cut off beyond 77 of them."""
    tokenizer, learned = load_quick_tokenizer(folder), learned_tokens(folder)
    prompt = with_all_vectors(prompt, tokenizer, learned)
    encoding = tokenizer.encode(prompt, add_special_tokens=False)
    room = MAX_TOKENS - 2  # start and end
    if len(encoding.tokens) > room:
        start = encoding.offsets[room][0]
        return f"{len(encoding.tokens) + 2} tokens, but {MAX_TOKENS} are read; cut off: {prompt[start:]!r}", "note"
    pieces = readable_pieces(encoding.tokens, learned)
    return f"{len(encoding.tokens) + 2} tokens: {' '.join(pieces)}", "ok"


def readable_pieces(tokens: list[str], learned: Collection[str] = ()) -> list[str]:
    """Tokens as text, "|" at the end of a word: CLIP spells bytes as letters, so that its own name of café| is cafÃ©.

    Tokens that hold a part of a character only are one piece; `learned` tokens are text already.
    """
    decoder, pieces, part = decoders.ByteLevel(), [], ""
    for number, token in enumerate(tokens, 1):
        if token in learned:
            pieces.append(f"{token}|")
            continue
        part += token.removesuffix("</w>")
        text = decoder.decode([part])
        if "\ufffd" not in text or number == len(tokens):
            pieces.append(text + ("|" if token.endswith("</w>") else ""))
            part = ""
    return pieces
