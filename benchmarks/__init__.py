"""Measurements; nothing of the project imports them."""
