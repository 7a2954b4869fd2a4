"""Evaluates a fine-tuned pipeline beside its baseline: samples both, scores the images, writes one page to look at."""

import sys

from utils.errors import run_main
from utils.evaluate_arguments import check, parse_args
from utils.samples import COMPARISON_FILE, REPORT_FILE, read_metrics, read_samples


def main(argv: list[str] | None = None) -> None:
    """generate -> score -> report. Each stage reads from --output_dir what the one before it left there."""
    args = parse_args(argv)
    for note in check(args):
        print(note, file=sys.stderr if note.startswith("warning") else sys.stdout, flush=True)

    # The stages are imported here: torch takes seconds, and neither --help nor a mistake needs to wait for it.
    if "generate" in args.stages:  # images of every model, prompt and seed; samples.json; comparison.png
        from utils.generation import generate

        generate(args, args.prompts)
    samples = read_samples(args.output_dir)

    if "score" in args.stages:  # metrics.json, metrics.csv
        from utils.scoring import score

        for line in summary(score(args, samples)):
            print(line)

    if "report" in args.stages:  # report.html
        from utils.evaluation.report import write_report

        write_report(args.output_dir, samples, read_metrics(args.output_dir, samples))

    if "generate" in args.stages:
        print(f"Look at {args.output_dir / COMPARISON_FILE}")
    if "report" in args.stages:
        print(f"Look at {args.output_dir / REPORT_FILE}")


def summary(metrics: dict) -> list[str]:
    """What was measured, in a few lines: a metric that has no value is left out here (the report says why)."""
    lines = []
    shown = (("CLIP-I", "clip_i"), ("DINO", "dino"), ("CLIP-T", "clip_t"), ("COPY", "copy_clip"), ("DIV", "div_clip"))
    for model, values in metrics["models"].items():
        cells = [f"{name} {values[key]['value']:.3f}" for name, key in shown if values[key]["value"] is not None]
        if cells:
            lines.append(f"{model}: {', '.join(cells)}")
    for model, warnings in metrics["warnings"].items():
        found = [warning for warning in warnings if warning["level"] == "warning"]
        lines += [f"{model}: {warning['title']}. {warning['text']}" for warning in found]
    return lines


if __name__ == "__main__":
    sys.exit(run_main(main))
