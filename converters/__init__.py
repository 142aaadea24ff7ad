"""One artifact in, another out: a file each."""
