"""Statistics of distillation studies, one method a module; what a study may claim stands in `planned_comparisons`.

- `scores`: the declared frames, and improvement over fine-tuning with or without a choice of temperature;
- `paired`, `multiple_testing`, `group_tests`, `rank_correlation`, `equivalence`, `power`, `mixed_model`: the methods;
- `planned_comparisons`: comparisons that were declared before the run, from one row an item; `verdicts`: on its claims.

May import the shared package `tutelage` alone. Random numbers come from a generator that is passed in. scipy,
statsmodels and polars are imported by the modules, so import these only where they are used.
"""
