"""Converters: other projects' weights and tokenizers, read into our modules, and Llama 3.2 Vision folders written."""
