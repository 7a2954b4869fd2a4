"""The third stage of an evaluation: report.html, one file that needs no network, for everything there is to see."""

from utils.evaluation.report.page import write_report

__all__ = ["write_report"]
