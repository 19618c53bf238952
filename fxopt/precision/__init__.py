"""Precision: what each parameter is stored, computed and updated in."""
