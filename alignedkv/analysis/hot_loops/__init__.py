"""The loops over T tokens times D channels: what the analysis compiles with Numba."""
