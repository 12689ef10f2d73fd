"""Classical survival statistics, exact, from sums that sites send."""
