"""Make a language model forget, and show that it did."""
