"""Stretto trains transformer models that are too large, too slow or too long for one device."""
