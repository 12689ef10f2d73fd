"""Pooled evaluation of survival models from one table of counts: cancer type, event, risk bin, time bin."""
