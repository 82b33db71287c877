"""The best schedule that can be found for given costs, memory and placements, and how far from optimal it can be."""
