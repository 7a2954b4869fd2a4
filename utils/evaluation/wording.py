"""How numbers are written for people, in the terminal and on the page."""

MINUS = "\u2212"


def number(value: float | None) -> str:
    """0.123 or \u22120.123, with a real minus sign; nothing for None."""
    return "" if value is None else f"{round(value, 3) + 0.0:.3f}".replace("-", MINUS)


def percent(value: float) -> str:
    """62% or \u22123%, with a real minus sign."""
    return f"{round(100 * value):d}%".replace("-", MINUS)


def listed(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
