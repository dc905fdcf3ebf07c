"""What a model predicts from plain text. `evaluate` and registered models use the same code.

MLflow stores a copy of this package with each registered model, so it stands alone: it imports numpy, torch and transformers,
and nothing of mixtune.
"""
