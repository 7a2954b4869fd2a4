"""How numbers and metrics are written for people, in the terminal and on the page."""

MINUS = "\u2212"
LABELS = {
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "clip_t": "CLIP-T",
    "clip_t_other": "CLIP-T on other things",
    "clip_i_other": "CLIP-I on other things",
    "dino_other": "DINO on other things",
    "pres_clip": "PRES",
    "pres_dino": "PRES",
    "div_clip": "DIV",
    "div_dino": "DIV",
    "copy_clip": "COPY",
    "copy_dino": "COPY",
}


def number(value: float | None) -> str:
    """0.123 or \u22120.123, with a real minus sign; nothing for None."""
    return "" if value is None else f"{round(value, 3) + 0.0:.3f}".replace("-", MINUS)


def short(value: float, digits: int = 4) -> str:
    """As few digits as say it, at most `digits`, with a real minus sign."""
    return f"{value:.{digits}g}".replace("-", MINUS)


def signed(value: float) -> str:
    """+0.123 or \u22120.123, with a real minus sign; zero is never negative."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", MINUS)


def change_in_words(change: float, interval: tuple[float, float] | None) -> str:
    """The change, and its interval if there is one."""
    text = signed(change)
    return text + (f", 95% interval {signed(interval[0])} to {signed(interval[1])}" if interval else "")


def listed(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
