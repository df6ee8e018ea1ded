"""Texts and files in and out."""
