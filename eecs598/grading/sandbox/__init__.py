"""Run submissions in processes of their own that can't harm the grader or the machine."""
