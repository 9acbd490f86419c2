"""Room 8: many runs of one experiment. Search spaces, trials on Optuna's storages, their report.

Knows nothing of models; a trial is a normal run directory, made by the functions of `train/`.
"""
