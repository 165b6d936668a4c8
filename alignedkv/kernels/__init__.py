"""The kernels: one specification and the implementations that answer to it."""
