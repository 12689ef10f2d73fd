"""Runs inside one hospital: the only code that opens patient files."""
