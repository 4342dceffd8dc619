"""A record, laid out for people."""
