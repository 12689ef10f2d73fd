"""The door in: read what a hospital has, check it, prepare it for a model."""
