"""Products from packed MXFP4 weights, in Gluon, for Hopper: their fragments go from memory into registers."""
