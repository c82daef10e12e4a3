"""Objectives: what a student minimises, as pure functions of one value per token.

`registry` says which signal serves which objective (and needs no torch), `divergences` and `estimators` have the
definitions, `losses` computes them over a large vocabulary in bounded memory, `reductions` makes one number of a batch.
May import `teacher` and `data`.
"""
