"""Room 6, training: losses, optimisers, the step, the one loop, metrics, pretrain, finetune.

Knows nothing of HTTP or of foreign checkpoint formats.
"""
