"""Detections matched to ground truth, and every measure made from the matches."""
