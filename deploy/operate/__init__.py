"""A coordinator's view of a run and hand on it: state, start, stop, logs."""
