"""What an adapter costs at run time: models timed in turns."""
