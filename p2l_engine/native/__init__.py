"""Calls into the C core (csrc/): ``routing``, ``votes`` on numpy arrays, ``decoder`` on torch tensors, ``binding`` for all."""
