"""What the numbers say in plain words: the headline, what is not known, and a few lines to print."""

from utils.evaluation.checks import BLANK_BASELINE, QUESTIONS, all_checks
from utils.evaluation.findings import (
    FOUND,
    GOOD,
    MISSED,
    NOT_FOUND,
    NOT_LOOKED_FOR,
    SPOILT,
    UNCERTAIN,
    UNKNOWN,
    WARNING,
    Check,
    Verdict,
)
from utils.evaluation.visible import is_drawn
from utils.evaluation.wording import LABELS, listed, number


def judge(metrics: dict, model: str) -> Verdict:
    """The verdict on one model of metrics.json."""
    checks = all_checks(metrics, model)
    state, headline = summarise(checks, metrics.get("subject", {}).get("class_name") or "subject")
    return Verdict(state, headline, gaps_of(checks), checks)


def summarise(checks: tuple[Check, ...], subject: str) -> tuple[str, str]:
    """(state, headline) of a verdict."""
    aim, *_ = checks
    found = {check.kind: check.title for check in checks if check.state == FOUND}
    is_beside_blank = found.get("blank") == BLANK_BASELINE
    is_unknown = aim.state in (UNCERTAIN, NOT_LOOKED_FOR)
    draws_it = not is_unknown and aim.state != NOT_FOUND and is_drawn(aim.comparisons[0])
    harm = {
        "memorisation": "copies your photos",
        "collapse": "gives the same image for every seed",
        "drift": "follows other prompts less",
        "spread": f"draws your {subject} into other pictures" if draws_it else "makes other pictures like your photos",
        "blank": "is compared with images of one colour" if is_beside_blank else "gives images of one colour",
    }
    clauses = [clause for kind, clause in harm.items() if kind in found]
    if is_unknown:
        state, first = UNKNOWN, f"It is not known whether it draws your {subject}"
    elif not draws_it:
        state, first = MISSED, aim.title.replace("your subject", f"your {subject}")
    else:
        state, first = SPOILT if clauses else GOOD, f"It draws your {subject}"
    if clauses:
        return state, f"{first}. It {listed(clauses)}."
    if state != GOOD:
        return state, f"{first}."
    changes = {"prompt": "it follows the prompt less", "class": f"every {subject} that it draws is yours"}
    if notes := [clause for kind, clause in changes.items() if kind in found]:
        return state, f"{first}, but {listed(notes)}; nothing else that was looked for has suffered."
    return state, f"{first}, and nothing that was looked for has suffered."


def gaps_of(checks: tuple[Check, ...]) -> str:
    """What is not known, in plain sentences."""
    sentences = []
    for state, start in ((NOT_LOOKED_FOR, "Not looked for"), (UNCERTAIN, "Too few images to tell")):
        if questions := [QUESTIONS[check.kind] for check in checks if check.state == state]:
            sentences.append(f"{start}: {'; '.join(questions)}.")
    return " ".join(sentences)


def summary(metrics: dict) -> list[str]:
    """What was measured, in a few lines: a metric that has no value is left out here (the report says why)."""
    lines = []
    shown = ("clip_i", "dino", "clip_t", "copy_clip", "div_clip")
    for model, values in metrics["models"].items():
        cells = [f"{LABELS[key]} {number(values[key]['value'])}" for key in shown if values[key]["value"] is not None]
        if cells:
            lines.append(f"{model}: {', '.join(cells)}")
    for model in metrics["changes"]:
        verdict = judge(metrics, model)
        found = [check for check in verdict.checks if check.level == WARNING and check.state == FOUND]
        lines.append(f"{model}: {verdict.headline}")
        lines += [f"{model}: {check.title}. {check.text} {check.advice}" for check in found]
        lines += [f"{model}: {verdict.gaps}"] if verdict.gaps else []
    return lines
