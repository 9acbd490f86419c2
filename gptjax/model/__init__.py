"""Room 1, the model: ModelConfig, presets, positions, attention, block, decoder, heads.

Knows arrays and nothing of data, training or files. Parameter names are written once, in
`parameters.py`.
"""
