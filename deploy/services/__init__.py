"""Processes that stay: the coordinator's server and a hospital's node, under supervisors."""
