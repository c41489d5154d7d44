"""Fine-tunes a 4-bit LoRA from settings in the environment and leaves verified weights and a record of the run."""

__version__ = "0.1.0"
