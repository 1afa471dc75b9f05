"""Unlearning inside the Hugging Face Trainer."""
