"""Train language models from raw text to an aligned model: pretraining, fine-tuning, reward model, PPO and DPO."""

__version__ = "0.1.0"
