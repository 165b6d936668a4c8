"""Offline analysis: what precision do these activations need?"""
