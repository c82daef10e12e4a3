"""Reports of a run and of a study: one HTML file that needs nothing else, its figures and tables beside it.

`page` is the form that every report has, the paper audit's too. May import `results`, `scoring`, `tasks`, `statistics`.
"""

from tutelage.evaluator.report.run_report import write_report
from tutelage.evaluator.report.study_report import write_study_report

__all__ = ["write_report", "write_study_report"]
