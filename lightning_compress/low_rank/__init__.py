"""Low-rank factors in the place of dense weights: how to find them, how many, and how they replace a layer."""
