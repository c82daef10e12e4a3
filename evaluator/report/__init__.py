"""The report: one HTML file that needs nothing else, with its figures and tables beside it."""

from tutelage.evaluator.report.study_writing import write_study_report
from tutelage.evaluator.report.writing import write_report

__all__ = ["write_report", "write_study_report"]
