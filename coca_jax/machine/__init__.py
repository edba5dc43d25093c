"""The machine that a process runs on: its cores, its memory, the other processes of its run."""
