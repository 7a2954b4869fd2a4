"""Evaluates a fine-tuned pipeline beside its baseline: samples both, scores the images, writes one page to look at."""

import sys

from utils.command_line import run_main
from utils.evaluation.arguments import parse_args
from utils.evaluation.card import update_card
from utils.evaluation.plan import make_plan
from utils.evaluation.samples import COMPARISON_FILE, REPORT_FILE, read_metrics, read_samples


def main(argv: list[str] | None = None) -> None:
    """generate -> score -> report. Each stage reads from --output_dir what the one before it left there."""
    plan = make_plan(parse_args(argv))
    for level, note in plan.notes:
        line, stream = (f"warning: {note}", sys.stderr) if level == "warning" else (note, sys.stdout)
        print(line, file=stream, flush=True)

    # The stages are imported here: torch takes seconds, and neither --help nor a mistake needs to wait for it.
    if "generate" in plan.stages:  # images of every model, prompt and seed; samples.json; comparison.png
        from utils.evaluation.generate import generate

        generate(plan)
    samples = read_samples(plan.output_dir)

    if "score" in plan.stages:  # metrics.json, metrics.csv
        from utils.evaluation.score import score
        from utils.evaluation.verdict import summary

        for line in summary(score(plan, samples)):
            print(line)

    if "report" in plan.stages:  # report.html
        from utils.evaluation.report.page import write_report

        metrics = read_metrics(plan.output_dir, samples)
        write_report(plan.output_dir, samples, metrics)
        update_card(plan.finetuned_model_name_or_path, plan.output_dir, metrics)

    if "generate" in plan.stages:
        print(f"Look at {plan.output_dir / COMPARISON_FILE}")
    if "report" in plan.stages:
        print(f"Look at {plan.output_dir / REPORT_FILE}")


if __name__ == "__main__":
    sys.exit(run_main(main, interrupted="interrupted: the images so far are kept, the same command continues"))
