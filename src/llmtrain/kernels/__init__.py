"""Operators that beat torch's own on the processors they are meant for; everything else is torch."""
