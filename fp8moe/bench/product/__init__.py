"""What is measured of one grouped product."""
