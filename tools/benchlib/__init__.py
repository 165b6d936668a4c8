"""What a fair comparison of decode attention needs: the problem, the clock and the competitors.

A command in ``tools/`` imports it as a sibling.  Nothing here imports torch, CuPy or FlashInfer
before a function needs them, so that a missing one is a reported reason and not a crash.
"""
