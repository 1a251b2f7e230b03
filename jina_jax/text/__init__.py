"""Reads texts from files, tokenises them, and packs several into a row of a batch."""
