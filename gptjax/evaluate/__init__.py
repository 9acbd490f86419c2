"""Room 5, evaluation: log-likelihoods of text, and the scores made of them, each with its protocol.

Knows nothing of training. A score does not depend on batch size, padding or devices.
"""
