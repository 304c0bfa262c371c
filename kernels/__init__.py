"""Device kernels, one family a file, each beside its plain-torch oracle."""
