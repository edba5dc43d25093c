"""The process and its machine: signals, leases, multi-host startup, storage, metrics."""
