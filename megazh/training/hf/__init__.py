"""The engine of `-t hf`: models of transformers under Hugging Face's Trainer, on the recipe and data of any run."""
