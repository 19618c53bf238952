"""What of fxopt works on this machine, found by trying it: `fxopt doctor`."""
