"""What a process shows while it works, and what it is at."""
