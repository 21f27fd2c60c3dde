"""Running a submission in a process of its own that can do no harm."""
