"""The report: one HTML file with the pictures, made from numbers only."""
