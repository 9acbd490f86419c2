"""Room 2, the data: tokenizers, corpora to token files, packing, batches.

Knows nothing of the model. Batch k is a function of (seed, k, schedule) alone.
"""
