"""The report of an evaluation."""

from eecs598.report.analysis import Comparison, analyse, check_comparable, compare
from eecs598.report.html import figures_html, write_report

__all__ = ["Comparison", "analyse", "check_comparable", "compare", "figures_html", "write_report"]
