"""Data bases of embedded images: made, measured, searched and drawn."""
