"""What a model tells about the data it was trained on: membership attacks and model inversion, dense and compressed."""
