"""From fake quantization to one graph of integers, and the runtimes that run it."""
