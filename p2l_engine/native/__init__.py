"""Calls into the native core in C (csrc/)."""
