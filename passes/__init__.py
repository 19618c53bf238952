"""What is rewritten: one file per pass or rule family, imported as ``fxopt.passes``."""
