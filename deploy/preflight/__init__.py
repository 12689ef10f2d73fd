"""What can be told before a node starts: the way to the coordinator, keys, machine and data."""
