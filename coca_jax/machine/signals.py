"""What commands that watch for signals have in common."""

# A terminal and a program between it and this one both pass a Ctrl-C on, and `timeout` a signal
# that the whole group has got too: two within this time, in seconds, are one.
SAME_KEY = 0.5
AT_ONCE = 130  # the status of one that is ended by a second one, as a shell says of SIGINT
