"""Which of several models to take."""

from utils.evaluation.findings import FOUND, GOOD, Choice, Verdict
from utils.evaluation.verdict import fidelity_metric, judge
from utils.evaluation.wording import LABELS, listed, signed


def choose(metrics: dict) -> Choice | None:
    """The choice among the fine-tuned model and its checkpoints; None if there is but one, or no number.

    The largest sum of changes in subject fidelity, prompt fidelity, and fidelity to prompts without the subject, among
    those whose verdict is GOOD; if none is, among those that neither copy photos nor lost their variety.
    """
    names = list(metrics["changes"])
    fidelity = fidelity_metric(metrics)
    if len(names) < 2 or any(fidelity not in metrics["changes"][name] for name in names):
        return None
    counted = [
        key for key in (fidelity, "clip_t", "clip_t_other") if all(key in metrics["changes"][name] for name in names)
    ]
    gains = {name: sum(metrics["changes"][name][key]["value"] for key in counted) for name in names}
    verdicts = {name: judge(metrics, name) for name in names}
    good = [name for name in names if verdicts[name].state == GOOD]
    sound = good or [name for name in names if not is_spoilt(verdicts[name])] or names
    best = max(sound, key=gains.__getitem__)
    why = f"the largest change against the baseline in {listed([LABELS[key] for key in counted])} together"
    why += f" ({signed(gains[best])})"
    if len(sound) < len(names):
        kept = "draw the subject without a warning" if good else "neither copy photos nor lost their variety"
        why += f", among the {len(sound)} of {len(names)} that {kept}"
    label = best.replace("finetuned", "the fine-tuned model")
    sentence = f"Take {label}." if good else f"None of the {len(names)} is good: {label} is the least bad."
    return Choice(best, bool(good), sentence, why)


def is_spoilt(verdict: Verdict) -> bool:
    """Whether photos were copied or variety was lost."""
    return any(check.state == FOUND and check.kind in ("memorisation", "collapse") for check in verdict.checks)
