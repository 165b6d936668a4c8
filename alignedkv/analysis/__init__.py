"""Offline analysis: the precision that given activations need."""
