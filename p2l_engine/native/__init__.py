"""Calls into the native core in C (csrc/): ``routing`` on numpy arrays, ``decoder`` on torch tensors, ``binding`` for both."""
