"""Finds the fastest right configuration of a kernel for a GPU, and keeps it found.

`trials` has the data, `search` decides what to try next, `measure` tries it on a GPU, `replay`
answers from a recorded sweep instead, `wisdom` remembers winners.  Only `search` knows Optuna and
only `measure` a GPU, so reading wisdom needs neither.
"""
