"""Cryptography of the aggregation: small pure modules, entropy as an argument, nothing kept between calls."""
