"""The differentiable operations."""
