"""Models in the format of Hugging Face's transformers: out, and in."""
