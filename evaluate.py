"""Evaluates a fine-tuned pipeline beside its baseline: samples both, scores the images, writes one page to look at."""

import sys

from utils.command_line import leave, run_main
from utils.evaluation import subjects
from utils.evaluation.arguments import parse_args
from utils.evaluation.card import update_card
from utils.evaluation.hashes import hash_models
from utils.evaluation.plan import EvaluationPlan, make_plan
from utils.evaluation.samples import COMPARISON_FILE, FINETUNED, REPORT_FILE, read_metrics, read_samples
from utils.files.hashing import in_background
from utils.files.lock import hold_output
from utils.runtime import process
from utils.runtime.process import wrapped


def main(argv: list[str] | None = None) -> None:
    """generate -> score -> report, for each subject. Each stage reads from a folder what the one before left there."""
    args = parse_args(argv)
    plans = [make_plan(each) for each in subjects.split_by_subject(args)]
    with hold_output(args.output_dir, is_main=True):
        metrics = [evaluate(plan) for plan in plans]
    if "report" in args.stages and len(plans) == 1:
        update_card(plans[0].output_dir, metrics[0])
    for plan, found in zip(plans, metrics, strict=True):
        files = dict(generate=COMPARISON_FILE, report=REPORT_FILE)
        lines = [f"Look at {plan.output_dir / file}" for stage, file in files.items() if stage in args.stages]
        lines += conclusions(found) if found and "score" in args.stages else []
        print("\n".join(map(wrapped, lines)))


def evaluate(plan: EvaluationPlan) -> dict | None:
    """The stages that the plan has; returns metrics.json if images were scored or shown with their scores."""
    process.start_clock()
    for level, note in plan.notes:
        line, stream = (f"warning: {note}", sys.stderr) if level == "warning" else (note, sys.stdout)
        print(line, file=stream, flush=True)

    # The stages are imported here: torch takes seconds, and neither --help nor a mistake needs to wait for it.
    if "generate" in plan.stages:  # images of every model, prompt and seed; samples.json; comparison.png
        hashing = in_background(hash_models, plan)  # gigabytes, while the libraries and then the models are loaded
        from utils.evaluation.generate import generate

        generate(plan, hashing)
    samples, metrics = read_samples(plan.output_dir), None

    if "score" in plan.stages:  # metrics.json
        from utils.evaluation.score import score

        metrics = score(plan, samples)

    if "report" in plan.stages:  # report.html
        from utils.evaluation.report.page import write_report

        metrics = read_metrics(plan.output_dir, samples)
        write_report(plan.output_dir, samples, metrics)
    return metrics


def conclusions(metrics: dict) -> list[str]:
    """What was measured, and then which model to take, why, and the command that writes it."""
    lines, choice = [sentence["text"] for sentence in metrics["says"][FINETUNED]["sentences"]], metrics["choice"]
    if choice:
        lines.append(f"{choice['sentence']} {choice['why']}".strip())
        lines += [f"  {choice['command']}"] if choice["command"] else []
    return lines


if __name__ == "__main__":
    leave(run_main(main, interrupted="interrupted: the images so far are kept, the same command continues"))
