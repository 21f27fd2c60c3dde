"""Benchmarks: the time of each part next to a named peer; no other package imports them."""
