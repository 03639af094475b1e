"""Figures 1 to 18 from the records of a study, one function each, and what they say in sentences.

`catalogue` lists them, `page` is the sheet they are drawn on, `python -m experiments.figures` draws
them. Nothing here imports jax or a model.
"""
