"""Room 4, generation: caches, decoding loops, sampling.

Knows nothing of training or HTTP. Answers do not depend on padding, batch size or cache length.
"""
