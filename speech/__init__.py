"""From sound to rows of a language model's input: features, encoders, adapter."""
