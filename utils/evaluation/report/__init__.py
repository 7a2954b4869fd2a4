"""The third stage of an evaluation: report.html, one file that needs no network, for everything there is to see.

page.py decides what is shown; report.html.jinja, chart.svg.jinja and style.css decide how.
"""

from utils.evaluation.report.page import write_report

__all__ = ["write_report"]
