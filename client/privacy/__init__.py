"""What a hospital keeps of its noisy releases: the ledger of their cost, and the answers themselves."""
