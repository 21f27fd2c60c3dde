"""A trained detector at work: any image file to boxes."""
