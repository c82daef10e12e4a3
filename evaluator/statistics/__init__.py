"""Statistics of distillation studies: the published tests as published, stricter ones, and what divides them.

- `scores`: the declared frames, and improvement over fine-tuning with or without a choice of temperature;
- `published`: the tests of Ramesh, Sengupta & Chakraborty (ACL Findings 2025), exactly as they ran them;
- `paired`, `families`, `groups`, `equivalence`, `power`, `mixed`: one small pure function a method;
- `strict`: what a study should report, from one row an item;
- `audit_*`, `claims`: where the published conclusions do and do not survive, computed from the released tables;
- `sections`: tables with captions, rendered as Markdown and HTML.

Random numbers come from a generator that is passed in. scipy, statsmodels and polars are imported by the
modules, so import these only where they are used.
"""
