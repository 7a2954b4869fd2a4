"""The third stage of an evaluation: report.html, one file that needs no network: page.py says what, the rest how."""
