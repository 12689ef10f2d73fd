"""Site folders made of pooled tables, of public releases, or of nothing."""
