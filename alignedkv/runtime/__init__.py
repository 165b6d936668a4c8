"""The runtime: what a Hugging Face model sees once it is patched."""
