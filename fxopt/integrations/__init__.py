"""One file per training stack that fxopt works with."""
