"""What is measured of one MoE layer."""
