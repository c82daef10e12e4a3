"""Objectives: what a student minimises, as pure functions of one value per token.

`table` says which signal serves which objective (and needs no torch), `divergences` has the definitions,
`loss` computes them over a large vocabulary in bounded memory, `reductions` makes one number of a batch.
"""
