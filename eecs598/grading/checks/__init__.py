"""The assignment's checks, a file for each part of it."""
