"""Triton kernels, one per file, each beside its plain-torch twin. Imports torch and triton only."""
