"""The report of an evaluation: its numbers, and an HTML page that shows them."""

from eecs598.report.analysis import Analysis, Comparison, analyze, check_comparable, compare
from eecs598.report.html import figures_html, write_report

__all__ = [
    "Analysis",
    "Comparison",
    "analyze",
    "check_comparable",
    "compare",
    "figures_html",
    "write_report",
]
