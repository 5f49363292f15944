"""`python -m fp8moe bench --model`: training steps of a whole Hugging Face model, of which experts are a part."""
