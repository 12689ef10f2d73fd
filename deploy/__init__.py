"""Ways to run it: the command line, simulation on one machine, comparison with pooled and local training."""
