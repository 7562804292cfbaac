"""Triton kernels, one per file, each with its torch reference implementation. Imports torch and triton only."""
