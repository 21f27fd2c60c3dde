"""What every other part stands on: files, hardware and versions, several processes."""
