"""One file per command: parse flags, make one call, print the result."""
