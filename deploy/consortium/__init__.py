"""What a coordinator keeps of its consortium: keys, certificates, start-up kits, members."""
